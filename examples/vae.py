"""A variational autoencoder: digits from a few numbers each.

    KILN_DATA=… python examples/vae.py --out figures/

The network of NNabla's tutorial, 784-500-500-(50, 50) and back with ELU, learns
MNIST's pixels, those above half of white as 1: Adam with 1e-3, batches of 128,
20 epochs. After each epoch it looks at the ELBO of the 10,000 test images. The
figure has the training and the test curve, test images over what their codes
remember, images made from the prior, what each number of a code does, and a map
of the codes by t-SNE. MNIST is read from KILN_DATA or downloaded; without it,
the example runs on scikit-learn's 1,797 digits of 8 × 8 pixels.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import kiln
from inference.reporting.autoencoder_section import EncodedRows
from kiln.data import digits, mnist_bits
from kiln.guides import amortized_encoder
from kiln.models import VAE

BATCH, LR = 128, 1e-3
MAPPED = 3000


@dataclass(frozen=True)
class Images:
    """Training and test images as rows of bits, and the digits that the test images show."""

    x: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def side(self) -> int:
        """Pixels of a side."""
        return int(self.x.shape[1] ** 0.5)

    @classmethod
    def read(cls) -> Images:
        """MNIST, or scikit-learn's digits where it is neither on this machine nor to be had."""
        try:
            train, test = mnist_bits("train"), mnist_bits("t10k")
        except FileNotFoundError as missing:
            print(f"no MNIST, so this runs on scikit-learn's digits: {missing}", file=sys.stderr)
            return cls.of_digits()
        return cls(train.x, test.x, np.asarray(test.y))

    @classmethod
    def of_digits(cls) -> Images:
        """Scikit-learn's digits, a quarter of them kept back."""
        table = digits()
        held_out = np.random.default_rng(0).permutation(len(table.x)) < len(table.x) // 4
        bits = (table.x > 7).astype(np.float32)
        return cls(bits[~held_out], bits[held_out], np.asarray(table.y)[held_out].astype(np.int64))


@dataclass
class Curves:
    """The ELBO in nats an image after each epoch: of the epoch's batches, and of the test images."""

    rows: int
    x_test: np.ndarray
    epochs: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)

    def __call__(self, now: kiln.Progress) -> None:
        """Add the curves of the last epoch."""
        self.epochs.append(now.step * BATCH / self.rows)
        self.training.append(-float(now.losses.mean()) / self.rows)
        bound = now.posterior.log_evidence(self.x_test, samples=1, progress=False)
        self.test.append(float(bound.mean()))

    def draw(self, axes: Axes) -> None:
        """Both, by epoch."""
        axes.plot(self.epochs, self.training, "o-", ms=3, label="training")
        axes.plot(self.epochs, self.test, "s-", ms=3, label="test")
        axes.set(xlabel="epoch", ylabel="ELBO (nats an image)")
        axes.legend(frameon=False)


def run(
    data: Images, epochs: int, seed: int = 0, latent: int = 50, progress: bool = True
) -> tuple[kiln.Posterior, Curves]:
    """Fit the autoencoder as the tutorial does; the test curve beside it."""
    torch.manual_seed(seed)
    hidden = (500, 500) if data.side == 28 else (100, 100)
    model = VAE(data.x.shape[1], latent=latent, hidden=hidden, image_shape=(data.side, data.side))
    epoch = -(-len(data.x) // BATCH)
    curves = Curves(len(data.x), data.x_test)
    posterior = kiln.fit(
        model,
        amortized_encoder(model),
        data.x,
        steps=epochs * epoch,
        lr=LR,
        batch_size=BATCH,
        seed=seed,
        callbacks=[kiln.every(epoch, curves)],
        progress=progress,
    )
    return posterior, curves


def draw(posterior: kiln.Posterior, curves: Curves, data: Images, path: Path) -> None:
    """All panels in one figure."""
    codes = EncodedRows(posterior, torch.as_tensor(data.x_test[:MAPPED]))
    panels: dict[str, Callable[[Axes], None]] = {
        "curves": curves.draw,
        "remembered": codes.reconstructions,
        "made": codes.samples,
        "numbers": codes.traversal,
        "map": lambda axes: codes.map(axes, data.y_test[:MAPPED], "tsne"),
    }
    figure = Figure(figsize=(12.5, 10.5), layout="constrained")
    layout = [["curves", "remembered"], ["map", "made"], ["map", "numbers"]]
    grid: dict[str, Axes] = figure.subplot_mosaic(layout, height_ratios=[1, 1, 1.3])
    for name, show in panels.items():
        show(grid[name])
    figure.savefig(path, dpi=100)


def main() -> None:
    """Fit, print the scores, save the figure, and write the report where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, MNIST or not")
    parser.add_argument("--report", action="store_true", help="write report.html too")
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
    options.out.mkdir(parents=True, exist_ok=True)
    data = Images.of_digits() if options.digits else Images.read()
    posterior, curves = run(data, options.epochs)
    bound = posterior.log_evidence(data.x_test[:1000], samples=1000)
    print(f"ELBO of test images                         {curves.test[-1]:8.2f} nats an image")
    print(f"log p(x), of 1,000 of them, 1,000 draws     {float(bound.mean()):8.2f} nats an image")
    active = int(posterior.encode(data.x_test).active().sum())
    print(
        f"numbers of a code that say anything         {active:5d} of {posterior.encode(data.x_test[:1]).mean.shape[1]}"
    )
    draw(posterior, curves, data, options.out / "vae.png")
    print(f"figure: {options.out / 'vae.png'}")
    if options.report:
        path = posterior.report(options.out / "report.html", test=(data.x_test,), groups=data.y_test)
        print(f"report: {path}")


if __name__ == "__main__":
    main()
