"""Microseconds a step: Kiln's engine against Pyro's ``SVI.step``, on the same model and guide.

    python -m benchmarks.svi_step --threads 1

The works are Edward's network (40 rows, 141 latents) and a linear regression.
Each repeat times every contender once, in turn, so that a change of the
machine's speed meets them all; medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import Trace_ELBO
from tqdm import trange

from guides import mean_field_normal
from inference.eager import EagerEngine
from inference.isolation import RandomStream
from inference.program import Program
from ppl_models import bnn_regression, linear_regression
from ppl_models.datasets import cosine

Steps = Callable[[int], object]


def pyro_svi(model: Any, args: tuple[torch.Tensor, ...]) -> Steps:
    """The loop of Pyro's documentation: ``SVI``, ``pyro.optim.Adam``, ``Trace_ELBO``."""
    pyro.clear_param_store()
    svi = PyroSVI(model, mean_field_normal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())

    def run(steps: int) -> None:
        for _ in range(steps):
            svi.step(*args)

    return run


def kiln_eager(model: Any, args: tuple[torch.Tensor, ...]) -> Steps:
    """The engine of ``fit``, without its progress bar."""
    stream = RandomStream.seeded(0)
    program = Program.start(model, mean_field_normal(model), args, stream, torch.device("cpu"), torch.float32)
    engine = EagerEngine(program, args)
    state = engine.init(stream)
    return lambda steps: engine.advance(state, steps)


def measure(contenders: dict[str, Steps], steps: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds a step, one figure a repeat, the contenders in turn."""
    for run in contenders.values():
        run(steps // 5)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in trange(repeats, desc="repeat", leave=False):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(steps)
            times[name].append((time.perf_counter() - start) / steps * 1e6)
    return times


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    data = cosine()
    args = (torch.tensor(data.x, dtype=torch.float32), torch.tensor(data.y, dtype=torch.float32))
    print(f"{platform.machine()}, torch {torch.__version__}, Pyro {pyro.__version__}, {options.threads} thread(s)")
    print(f"{'work':<20}{'Pyro SVI, µs':>14}{'Kiln eager, µs':>16}{'Kiln / Pyro':>13}{'min–max':>14}")
    for name, model in {"Edward's network": bnn_regression, "linear regression": linear_regression}.items():
        times = measure(
            {"pyro": pyro_svi(model, args), "kiln": kiln_eager(model, args)}, options.steps, options.repeats
        )
        ratios = [kiln / theirs for kiln, theirs in zip(times["kiln"], times["pyro"], strict=True)]
        medians = {key: statistics.median(values) for key, values in times.items()}
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        ratio = statistics.median(ratios)
        print(f"{name:<20}{medians['pyro']:>14.0f}{medians['kiln']:>16.0f}{ratio:>13.2f}{spread:>14}")


if __name__ == "__main__":
    main()
