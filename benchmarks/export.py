"""A prediction of one row: the exported predictor, with NumPy alone, beside ``posterior.predict``, with torch.

    OMP_NUM_THREADS=1 python -m benchmarks.export

Each repeat asks both in turn for the S draws of E[y | x, zₛ] and their moments;
medians are printed, with the largest difference of the draws, relative to the
largest of them, for a fit in single and in double precision. What the weights
are does not matter here: fits are of a few steps.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from guides import amortized_encoder, bernoulli_dropout, full_rank_normal, mean_field_normal
from inference import Posterior, fit
from inference.export.runtime.predictor import Predictor, load
from ppl_models import (
    VAE,
    DropoutCNN,
    DropoutNetwork,
    DropoutRegression,
    bnn_regression,
    exact_linear_regression,
    linear_regression,
)

Fit = Callable[[torch.dtype], Posterior]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 8, generator=GENERATOR)
Y = X[:, 0] - X[:, 1] ** 2 + 0.1 * torch.randn(200, generator=GENERATOR)
IMAGES = torch.rand(100, 784, generator=GENERATOR)


def fitted(model: Any, guide: Any, *data: Any, dtype: torch.dtype) -> Posterior:
    """A few steps, in the eager engine."""
    return fit(model, guide, *data, steps=20, dtype=dtype, engine="eager", progress=False)


def regression(model: Any, build: Any, dtype: torch.dtype) -> Posterior:
    """A model of X and Y."""
    return fitted(model, build(model), X, Y, dtype=dtype)


def exact(dtype: torch.dtype) -> Posterior:
    """Linear regression, in closed form."""
    guide = exact_linear_regression(X, Y, noise=0.5).guide
    return fitted(partial(linear_regression, noise=0.5), guide, X, Y, dtype=dtype)


def dropout(make: Callable[[], Any], data: tuple[Any, ...], dtype: torch.dtype) -> Posterior:
    """A network with masks."""
    model = make().to(dtype)
    return fitted(model, bernoulli_dropout(model), *data, dtype=dtype)


def autoencoder(dtype: torch.dtype) -> Posterior:
    """784-500-500-50 and back."""
    model = VAE().to(dtype)
    return fitted(model, amortized_encoder(model), (IMAGES > 0.7).to(dtype), dtype=dtype)


def layers() -> DropoutNetwork:
    """Two hidden layers of 50."""
    nn = torch.nn
    hidden = [nn.Linear(8, 50), nn.ReLU(), nn.Dropout(0.1), nn.Linear(50, 50), nn.Tanh(), nn.Dropout(0.1)]
    return DropoutNetwork(nn.Sequential(*hidden, nn.Linear(50, 1)), noise=0.1)


WORKS: dict[str, Fit] = {
    "linear_regression": partial(regression, linear_regression, full_rank_normal),
    "exact_linear_regression": exact,
    "bnn_regression": partial(regression, partial(bnn_regression, noise="learned"), mean_field_normal),
    "bnn_regression, heteroscedastic": partial(
        regression, partial(bnn_regression, noise="heteroscedastic"), mean_field_normal
    ),
    "bnn_regression, one layer of 50": partial(regression, partial(bnn_regression, hidden=(50,)), mean_field_normal),
    "DropoutNetwork": partial(dropout, layers, (X, Y)),
    "DropoutRegression": partial(dropout, lambda: DropoutRegression(8), (X, Y)),
    "DropoutCNN, 28 × 28, 1,000 units": partial(
        dropout, lambda: DropoutCNN(brightest=1), (IMAGES, torch.arange(100) % 10)
    ),
    "VAE, 784-500-500-50": autoencoder,
}


def taken_away(make: Fit, dtype: torch.dtype, draws: int) -> tuple[Posterior, Predictor, float, float]:
    """A posterior, its predictor, the size of the file in MB, and the seconds that export took."""
    torch.manual_seed(0)
    posterior = make(dtype)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = posterior.export(Path(folder) / "predictor.npz", draws=draws)
        seconds = time.perf_counter() - start
        return posterior, load(path), path.stat().st_size / 1e6, seconds


def asked(answer: Any) -> Any:
    """The moments that are computed when they are read."""
    return answer.probs if hasattr(answer, "probs") else (answer.mean, answer.variance)


def measure(posterior: Posterior, predictor: Predictor, draws: int, repeats: int) -> tuple[float, float]:
    """Median milliseconds for one row: by torch, by NumPy."""
    one = posterior.data[0][:1]
    array = one.numpy()
    runs = (
        lambda: asked(posterior.predict(one, draws=draws, progress=False)),
        lambda: asked(predictor.predict(array)),
    )
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 2):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if repeat >= 2:
                found.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def difference(posterior: Posterior, predictor: Predictor, draws: int) -> float:
    """Of the draws at twenty rows, relative to the largest; that found at the export where rows have own latents."""
    if set(predictor.latents) != set(posterior.sample(1)):
        return float(predictor.manifest["agreement"])
    x = posterior.data[0][:20]
    expected = posterior.predict(x, draws=draws, progress=False).draws.numpy()
    return float(np.abs(predictor.predict(x).draws - expected).max() / np.abs(expected).max())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--works", nargs="*", choices=list(WORKS), default=list(WORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, NumPy {np.__version__}, {options.draws} draws, one row")
    heads = ["", "torch, ms", "NumPy, ms", "ratio", "difference", "in double", "file, MB", "export, s"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for name in tqdm(options.works, leave=False):
        posterior, predictor, size, seconds = taken_away(WORKS[name], torch.float32, options.draws)
        by_torch, by_numpy = measure(posterior, predictor, options.draws, options.repeats)
        single = difference(posterior, predictor, options.draws)
        double = difference(*taken_away(WORKS[name], torch.float64, options.draws)[:2], options.draws)
        cells = [f"{by_torch:.2f}", f"{by_numpy:.2f}", f"{by_torch / by_numpy:.1f}", f"{single:.0e}", f"{double:.0e}"]
        lines.append("| " + " | ".join([name, *cells, f"{size:.2f}", f"{seconds:.1f}"]) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
