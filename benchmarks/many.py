"""Many fits at once: restarts of Edward's network against one fit, and 240 dropout networks against one by one.

    python -m benchmarks.many --threads 1
    python -m benchmarks.many --threads 2 --epochs 400

(a) 32 restarts of Edward's network, and one fit of it, by Adam at 0.01, from a warm cache: seconds of the call, and
µs a step alone, which is what the call takes beyond a tenth of its steps. (b) The grid of Gal, Ghahramani (2016) on
the UCI set yacht, 20 splits by 12 settings, by ``fit_many``; one after the other is measured on some of the fits,
spread over splits and settings, and scaled by their number, on one by the eager engine too. The data come from the
folder named by KILN_DATA.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.problems import edward
from benchmarks.uci import BATCH, HIDDEN, LENGTH_SCALE, SPLITS
from guides import bernoulli_dropout
from inference import fit, fit_many
from ppl_models import DropoutNetwork
from ppl_models.data.download import data_folder
from ppl_models.data.tables import load_npz


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds that ``run`` takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def restarts(count: int, steps: int, repeats: int) -> None:
    """Print what ``count`` restarts of Edward's network cost beside one fit."""
    work = edward()
    options: dict[str, Any] = {"lr": work.lr, "engine": "compiled", "progress": False}

    def call(number: int, steps: int) -> float:
        return seconds(lambda: fit(work.model, work.guide, *work.args, restarts=number, steps=steps, **options))

    short = steps // 10
    for number in (1, count):
        call(number, short)  # compiles
    times: dict[tuple[int, int], list[float]] = {}
    for _ in range(repeats):
        for case in ((1, steps), (count, steps), (1, short), (count, short)):
            times.setdefault(case, []).append(call(*case))
    medians = {case: statistics.median(values) for case, values in times.items()}
    one, many = medians[1, steps], medians[count, steps]
    print(
        f"Edward's network, {steps:,} steps: one fit {one:.2f} s, {count} restarts {many:.2f} s: ratio {many / one:.1f}"
    )
    alone = [(medians[n, steps] - medians[n, short]) / (steps - short) * 1e6 for n in (1, count)]
    print(f"  steps alone: {alone[0]:.1f} and {alone[1]:.1f} µs: ratio {alone[1] / alone[0]:.1f}", flush=True)


def network(features: int, p: float, tau: float, seed: int) -> DropoutNetwork:
    """One hidden layer of 50 ReLU with dropout on inputs and hidden units, and noise of precision τ."""
    torch.manual_seed(seed)
    layers = (nn.Dropout(p), nn.Linear(features, HIDDEN), nn.ReLU(), nn.Dropout(p), nn.Linear(HIDDEN, 1))
    return DropoutNetwork(nn.Sequential(*layers), noise=tau**-0.5, length_scale=LENGTH_SCALE)


def standardised(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """The training rows of a split, in units of their own spread."""
    spread = x[rows].std(0)
    spread[spread == 0] = 1
    parts = (x[rows] - x[rows].mean(0)) / spread, (y[rows] - y[rows].mean()) / y[rows].std()
    return torch.as_tensor(parts[0], dtype=torch.float32), torch.as_tensor(parts[1], dtype=torch.float32)


def grid(name: str) -> list[Any]:
    """The calls of ``fit`` for all splits and settings of a UCI set."""
    stored = load_npz(data_folder("uci", f"{name}.npz") / f"{name}.npz")
    cut = int(0.8 * len(stored["train_0"]))
    data = [standardised(stored["x"], stored["y"], stored[f"train_{i}"][:cut]) for i in range(SPLITS)]
    settings = [(float(p), float(tau)) for p in stored["dropout_grid"] for tau in stored["tau_grid"]]
    models = [network(data[0][0].shape[1], p, tau, seed=i) for i, (p, tau) in enumerate(settings)]
    guides = [bernoulli_dropout(model) for model in models]
    return [partial(fit, *pair, *split) for split in data for pair in zip(models, guides, strict=True)]


def many(name: str, epochs: int, alone: int) -> None:
    """Print what the whole grid costs at once beside one fit after the other."""
    fits = grid(name)
    rows = len(fits[0].args[2])
    options: dict[str, Any] = {"steps": epochs * -(-rows // BATCH), "batch_size": BATCH, "lr": 1e-3}
    options |= {"engine": "compiled", "progress": False}
    chosen = fits[:: len(fits) // alone + 1]
    for call in chosen:
        call(**{**options, "steps": 10})  # compiles
    fit_many(fits, **{**options, "steps": 10})
    each = [seconds(partial(call, **options)) for call in chosen]
    eager = seconds(partial(chosen[0], **{**options, "engine": "eager"}))
    together = seconds(lambda: fit_many(fits, **options))
    total = sum(each) / len(each) * len(fits)
    print(
        f"{name}, {len(fits)} fits of {options['steps']:,} steps: at once {together:.1f} s; one after the other "
        f"{total:.0f} s, from {len(each)} fits of {sum(each) / len(each):.2f} s: {total / together:.1f} times faster"
    )
    eagerly = eager * len(fits)
    print(f"  by the eager engine {eagerly:.0f} s, from one of {eager:.2f} s: {eagerly / together:.1f} times faster")
    spent = seconds(lambda: fit_many(fits, **{**options, "steps": options["steps"] // 10}))
    step = (together - spent) / (options["steps"] - options["steps"] // 10) * 1e6
    print(f"  steps alone: {step:.0f} µs for all, {step / len(fits):.1f} µs for each", flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", default="yacht")
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--alone", type=int, default=12, help="fits that are measured one after the other")
    parser.add_argument("--parts", nargs="+", choices=("restarts", "grid"), default=("restarts", "grid"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("always")
    if "restarts" in options.parts:
        restarts(options.restarts, options.steps, options.repeats)
    if "grid" in options.parts:
        many(options.set, options.epochs, options.alone)


if __name__ == "__main__":
    main()
