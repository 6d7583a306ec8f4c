"""MC dropout as approximate Bayes: what a network for digits is unsure of.

    KILN_DATA=… python examples/mc_dropout.py --out figures/

Chainer's tutorial network (two convolutions, two layers of 1,000 units with
dropout) learns MNIST as the tutorial has it: Adam with 1e-4, batches of 1,000,
10 epochs. Each of 50 draws of the masks is one network for all 10,000 test
images, and the entropy of their mean says how unsure they are: for every digit
the figure shows the 30 images of the lowest and the 30 of the highest entropy.
MNIST is read from KILN_DATA or downloaded; without it, the example runs on
scikit-learn's 1,797 digits of 8 × 8 pixels.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import kiln
from inference.predictive.scoring import ClassScores, HeldOut
from inference.reporting.figures.image_grids import entropy_grids
from kiln.data import digits, mnist
from kiln.guides import bernoulli_dropout
from kiln.models import DropoutCNN

DRAWS, BATCH, SHOWN = 50, 1000, 9


@dataclass(frozen=True)
class Images:
    """Training and test images as flat rows, their labels, and what a white pixel is."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    side: int
    brightest: float

    @classmethod
    def read(cls) -> Images:
        """MNIST, or scikit-learn's digits where it is neither on this machine nor to be had."""
        try:
            train, test = mnist("train"), mnist("t10k")
        except FileNotFoundError as missing:
            print(f"no MNIST, so this runs on scikit-learn's digits: {missing}", file=sys.stderr)
            return cls.of_digits()
        return cls(train.x, _labels(train.y), test.x, _labels(test.y), 28, 255.0)

    @classmethod
    def of_digits(cls) -> Images:
        """Scikit-learn's digits, a quarter of them kept back."""
        table = digits()
        held_out = np.random.default_rng(0).permutation(len(table.x)) < len(table.x) // 4
        y = _labels(table.y)
        return cls(table.x[~held_out], y[~held_out], table.x[held_out], y[held_out], 8, 16.0)


def _labels(y: Any) -> np.ndarray:
    return np.asarray(y).astype(np.int64)


def run(data: Images, epochs: int, seed: int = 0, fast: bool = False, progress: bool = True) -> kiln.Posterior:
    """Fit the network: as the tutorial does, or ``fast``, by small batches and steps that fall from 1e-3."""
    torch.manual_seed(seed)
    scale = 3.0 if fast else 1.0
    model = DropoutCNN((data.side, data.side), brightest=data.brightest, length_scale=scale)
    batch = min(200 if fast else BATCH, len(data.x) // 10)
    steps = max(1, epochs * len(data.x) // batch)
    step_size = kiln.cosine_decay(1e-3, steps) if fast else 1e-4
    return kiln.fit(
        model,
        bernoulli_dropout(model),
        data.x,
        data.y,
        steps=steps,
        lr=step_size,
        batch_size=batch,
        seed=seed,
        progress=progress,
    )


def say(prediction: kiln.ClassPrediction, scores: ClassScores, y: np.ndarray) -> None:
    """Print the scores of the predictions and of their uncertainty."""
    wrong, entropy = prediction.labels.numpy() != y, prediction.entropy.numpy()
    print(f"predicted rightly                    {scores.accuracy:8.2%} of {scores.rows:,}")
    if scores.error_auroc is not None:
        ratio = entropy[wrong].mean() / entropy[~wrong].mean()
        print(f"entropy of wrong ones / right ones   {ratio:8.1f}")
        print(f"AUROC of entropy for finding errors  {scores.error_auroc:8.3f}")
    print(f"expected calibration error           {scores.calibration_error:8.4f}")
    print(f"mean variation ratio                 {float(prediction.variation_ratio.mean()):8.4f}")
    print(f"mean mutual information              {float(prediction.mutual_information.mean()):8.4f} nats")


def main() -> None:
    """Fit, print the scores, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--fast", action="store_true", help="small batches, larger steps; 99.3 %% with --epochs 24")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, MNIST or not")
    parser.add_argument("--report", action="store_true", help="write report.html too")
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
    options.out.mkdir(parents=True, exist_ok=True)
    data = Images.of_digits() if options.digits else Images.read()
    posterior = run(data, options.epochs, fast=options.fast)
    held_out = cast(HeldOut, posterior.evaluate(data.x_test, data.y_test, draws=DRAWS, batch_size=BATCH))
    prediction = cast(kiln.ClassPrediction, held_out.prediction)
    say(prediction, cast(ClassScores, held_out.scores), data.y_test)
    images = 1.0 * data.x_test.reshape(-1, data.side, data.side) / data.brightest
    for name, classes in (("mc_dropout", None), ("mc_dropout_one", [SHOWN])):
        path = options.out / f"{name}.png"
        entropy_grids(images, data.y_test, prediction, classes=classes).savefig(path, dpi=110)
        print(f"figure: {path}")
    if options.report:
        print(f"report: {posterior.report(options.out / 'report.html', test=(data.x_test, data.y_test))}")


if __name__ == "__main__":
    main()
