"""MC dropout on MNIST: Kiln beside the same network in plain torch.

    KILN_DATA=… python -m benchmarks.mnist --threads 2

Both train Chainer's tutorial network as the tutorial does (Adam 1e-4, batches
of 1,000, 10 epochs) and predict the test images, and those of Fashion-MNIST,
from 50 draws; then Kiln by a recipe of its own. The scores: share right, mean
entropy of wrong images over that of right ones, AUROC of entropy for finding
errors and for telling Fashion-MNIST from MNIST, and the expected calibration
error with draws and from the network without dropout. Then the time of 50 draws
for 10,000 images, and its peak memory by batch size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.problems import Network
from guides import bernoulli_dropout
from inference import ClassPrediction, Posterior, cosine_decay, fit
from inference.predictive.scoring import reliability
from ppl_models import DropoutCNN
from ppl_models.data.datasets import fashion_mnist, mnist

DRAWS, EPOCHS, BATCH, LR = 50, 10, 1000, 1e-4


@dataclass(frozen=True)
class Scores:
    """Scores of a classifier's draws; see the head of this file."""

    seconds: float
    accuracy: float
    entropy_ratio: float
    error_auroc: float
    fashion_auroc: float
    calibration: float
    calibration_without: float

    def __str__(self) -> str:
        numbers = (self.accuracy, self.entropy_ratio, self.error_auroc, self.fashion_auroc)
        errors = (self.calibration, self.calibration_without)
        return f"{self.seconds:8.0f}{numbers[0]:9.4f}{numbers[1]:8.2f}" + "".join(
            f"{v:9.4f}" for v in numbers[2:] + errors
        )


def scores(seconds: float, test: Tensor, fashion: Tensor, without: Tensor, y: Tensor) -> Scores:
    """From class probabilities, (N, C): means over draws of test images and of Fashion-MNIST, and without dropout."""
    entropy, strange = torch.special.entr(test).sum(-1), torch.special.entr(fashion).sum(-1)
    wrong = test.argmax(-1) != y
    which = np.r_[np.zeros(len(entropy)), np.ones(len(strange))]
    return Scores(
        seconds,
        1 - float(wrong.double().mean()),
        float(entropy[wrong].mean() / entropy[~wrong].mean()),
        float(roc_auc_score(wrong, entropy)),
        float(roc_auc_score(which, torch.cat([entropy, strange]))),
        reliability(test, y).error,
        reliability(without, y).error,
    )


def by_torch(seed: int, data: Data) -> Scores:
    """The tutorial in plain torch: epochs of shuffled batches, a mask for each image and draw."""
    torch.manual_seed(seed)
    net, x, y = Network(), _pixels(data.x), data.y
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    began = time.perf_counter()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    seconds = time.perf_counter() - began
    test, fashion = (torch_draws(net, _pixels(images)).mean(0) for images in (data.x_test, data.fashion))
    return scores(seconds, test, fashion, _without(net, data), data.y_test)


@torch.no_grad()
def torch_draws(net: nn.Module, x: Tensor) -> Tensor:
    """The loop that one writes by hand: S draws, (S, N, C), a batch of images at a time."""
    net.train()
    return torch.stack([torch.cat([net(part).softmax(-1) for part in x.split(BATCH)]) for _ in range(DRAWS)])


def by_kiln(seed: int, data: Data, length_scale: float = 1.0, **options: Any) -> Scores:
    """Fit the network by Kiln."""
    torch.manual_seed(seed)
    model = DropoutCNN(length_scale=length_scale)
    began = time.perf_counter()
    posterior = fit(model, bernoulli_dropout(model), data.x, data.y, seed=seed, **options)
    seconds = time.perf_counter() - began
    test, fashion = (kiln_draws(posterior, images).probs for images in (data.x_test, data.fashion))
    net = Network()
    ours = [value for name, value in posterior.params.items() if name.startswith("net")]
    net.load_state_dict(dict(zip(net.state_dict(), ours, strict=True)))
    return scores(seconds, test, fashion, _without(net, data), data.y_test)


def kiln_draws(posterior: Posterior, x: Tensor, batch_size: int = BATCH) -> ClassPrediction:
    """S draws, each one network for all images."""
    return cast(ClassPrediction, posterior.predict(x, draws=DRAWS, batch_size=batch_size, progress=False))


@torch.no_grad()
def _without(net: nn.Module, data: Data) -> Tensor:
    """Class probabilities of the test images from the network with its dropout switched off."""
    net.eval()
    return torch.cat([net(part).softmax(-1) for part in _pixels(data.x_test).split(BATCH)])


def _pixels(images: Tensor) -> Tensor:
    return images.reshape(-1, 1, 28, 28) / 255


@dataclass(frozen=True)
class Data:
    """MNIST, and the test images of Fashion-MNIST, as bytes."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    fashion: Tensor

    @classmethod
    def read(cls) -> Data:
        """From KILN_DATA or the cache."""
        train, test = mnist("train"), mnist("t10k")
        arrays = (train.x, np.asarray(train.y), test.x, np.asarray(test.y), fashion_mnist().x)
        x, y, x_test, y_test, fashion = (torch.tensor(array) for array in arrays)
        return cls(x, y.long(), x_test, y_test.long(), fashion)


RECIPE: dict[str, Any] = {"steps": 7200, "lr": cosine_decay(1e-3, 7200), "batch_size": 200, "length_scale": 3.0}
TUTORIAL: dict[str, Any] = {"steps": EPOCHS * 60, "lr": LR, "batch_size": BATCH}


def head(threads: int) -> None:
    """Head of the tables of scores."""
    names = ("errors", "Fashion", "ECE", "without")
    print(f"{threads} threads\n{'':<22}{'seconds':>8}{'accuracy':>9}{'entropy':>8}" + "".join(f"{n:>9}" for n in names))


def tutorial(data: Data, seeds: int) -> None:
    """Run the tutorial's protocol in plain torch and in Kiln."""
    for seed in range(seeds):
        print(f"torch, tutorial   {seed:>3} {by_torch(seed, data)}", flush=True)
        print(f"Kiln, tutorial    {seed:>3} {by_kiln(seed, data, **TUTORIAL)}", flush=True)


def recipe(data: Data, seeds: int) -> None:
    """Small batches, steps that fall from 1e-3, and a prior that asks for smaller weights."""
    for seed in range(seeds):
        print(f"Kiln, own recipe  {seed:>3} {by_kiln(seed, data, **RECIPE)}", flush=True)


def speed(data: Data, repeats: int = 3) -> None:
    """Seconds for 50 draws of 10,000 images, in turn: Kiln, batches in torch, and an image and a draw at a time."""
    posterior = _short_fit(data)
    net, x = Network().train(), _pixels(data.x_test)
    times = np.array(list(_rounds(posterior, net, data.x_test, x, repeats)))
    kiln, batched, single = np.median(times, axis=0)
    print(
        f"50 draws of 10,000 images: Kiln {kiln:.1f} s; batches in torch {batched:.1f} s ({batched / kiln:.2f} times);"
    )
    print(f"an image and a draw at a time {single:.0f} s, from 2,000 of them ({single / kiln:.0f} times)")


@torch.no_grad()
def _rounds(posterior: Posterior, net: nn.Module, images: Tensor, x: Tensor, repeats: int) -> Iterator[list[float]]:
    for _ in range(repeats):
        began = time.perf_counter()
        kiln_draws(posterior, images)
        middle = time.perf_counter()
        torch_draws(net, x)
        end = time.perf_counter()
        for image in x[:2000]:
            net(image[None]).softmax(-1)
        yield [middle - began, end - middle, (time.perf_counter() - end) * len(x) * DRAWS / 2000]


def memory() -> None:
    """Peak memory of the prediction over what the process held before, each batch size in a process of its own."""
    for size in (10, 100, 1000, 10_000):
        command = [sys.executable, "-m", "benchmarks.mnist", "--memory", str(size)]
        said = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own module
        print(said.stdout, end="", flush=True)


def _memory_of(size: int, data: Data) -> None:
    posterior = _short_fit(data)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _kilobytes("VmRSS")
    kiln_draws(posterior, data.x_test, size)
    peak = (_kilobytes("VmHWM") - before) / 1024
    print(f"batch_size {size:>6}: {peak:6.0f} MB for a result of {DRAWS * 10_000 * (10 * 4 + 8) / 2**20:.0f} MB")


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _short_fit(data: Data) -> Posterior:
    """Speed and memory do not depend on what the network has learned."""
    model = DropoutCNN()
    few = (data.x[:1000], data.y[:1000])
    return fit(model, bernoulli_dropout(model), *few, steps=2, batch_size=100, progress=False)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=["tutorial", "recipe", "speed"], help="one of the tables")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Data.read()
    if options.memory:
        _memory_of(options.memory, data)
        return
    head(options.threads)
    if options.only in (None, "tutorial"):
        tutorial(data, options.seeds)
    if options.only in (None, "recipe"):
        recipe(data, options.seeds)
    if options.only in (None, "speed"):
        speed(data)
        memory()


if __name__ == "__main__":
    main()
