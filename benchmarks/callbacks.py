"""Cost of callbacks: microseconds a step of the compiled engine without any, with each, and with all.

    pip install -c constraints.txt -e ".[watch]"
    python -m benchmarks.callbacks --cores 2

The regression network of Chainer's tutorial, 1-16-32-1, on 100 points, with a
guide of one value a weight; each callback every 100 steps. Each repeat runs
every contender once, in turn, so that a change of the machine's speed meets
them all: medians, and the medians of the ratios within a repeat. The steps
have one thread; the process is bound to so many cores, of which files that are
written beside the steps use the second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoDelta
from tqdm import tqdm

from inference import JsonLines, LivePlot, ParameterTrace, Progress, Snapshots, TensorBoard
from inference.engine.compiled import CompiledEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.posterior import Posterior
from inference.predictive.approximation import FitRecord
from inference.svi.callbacks.base import CallbackRunner, opened
from inference.svi.restart_runner import CheckpointWriter, run_steps
from inference.utils.random_state import RandomStream
from ppl_models import bnn_regression

NONE, IDLE, ALL, ALL_BUT = "none", "one that does nothing", "all", "all but snapshots"
NAMES = [IDLE, "LivePlot", "JsonLines", "ParameterTrace", "TensorBoard", "Snapshots", ALL_BUT, ALL]
Makers = dict[str, Callable[[], list[Any]]]


class Nothing:
    """Callback that does nothing, which shows the cost of a call."""

    only_looks = True

    def __call__(self, now: Progress) -> None:
        """Nothing."""


def contenders(folder: Path) -> Makers:
    """Callbacks by name, new at each call."""
    single: Makers = {
        "LivePlot": lambda: [LivePlot(path=folder / "live.png")],
        "JsonLines": lambda: [JsonLines(folder / "log.jsonl", overwrite=True)],
        "ParameterTrace": lambda: [ParameterTrace()],
        "TensorBoard": lambda: [TensorBoard(folder / "board")],
        "Snapshots": lambda: [Snapshots(folder / "snapshots", overwrite=True)],
    }
    return {
        NONE: list,
        IDLE: lambda: [Nothing()],
        **single,
        ALL_BUT: lambda: [one for name, make in single.items() if name != "Snapshots" for one in make()],
        ALL: lambda: [one for make in single.values() for one in make()],
    }


class Tutorial:
    """Network of the tutorial, recorded and compiled once."""

    def __init__(self) -> None:
        x = torch.linspace(-1, 1, 100).reshape(-1, 1)
        self.args = (x, x[:, 0].exp())
        model = partial(bnn_regression, hidden=(16, 32))
        self.stream = RandomStream.seeded(0)
        device, kind = torch.device("cpu"), torch.float32
        self.bound_model = BoundModel.start(model, AutoDelta(model), self.args, self.stream, device, kind)
        self.engine = CompiledEngine(SVIProblem.on(self.bound_model, InMemory(self.args), lr=1e-3), self.stream)

    def posterior(self, flat_params: torch.Tensor, curves: torch.Tensor, seconds: float) -> Posterior:
        """Return the posterior as a fit builds it for callbacks."""
        losses, kl = curves.clone().numpy()
        return Posterior(self.bound_model, flat_params, self.args, ["x", "y"], FitRecord(losses, kl, seconds, 0))

    def time(self, callbacks: list[Any], steps: int) -> tuple[float, float]:
        """Microseconds a step, and milliseconds from the last step to the end."""
        state = self.engine.init(self.stream)
        with opened(callbacks):
            runner = CallbackRunner(callbacks, steps, self.bound_model.params, self.posterior)
            start = time.perf_counter()
            run_steps(
                self.engine, state, self.bound_model, runner, "", progress=False, writer=CheckpointWriter(None, dict)
            )
            done = time.perf_counter()
        return (done - start) / steps * 1e6, (time.perf_counter() - done) * 1e3


def measure(steps: int, repeats: int, names: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Return the results of :meth:`Tutorial.time` for each contender in each repeat."""
    work = Tutorial()
    with tempfile.TemporaryDirectory() as folder:
        makers = {name: make for name, make in contenders(Path(folder)).items() if name in names}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
        work.time([], steps)
        for _ in tqdm(range(repeats), unit="repeat", leave=False):
            for name, make in makers.items():
                times[name].append(work.time(make(), steps))
    return times


def table(times: dict[str, list[tuple[float, float]]]) -> str:
    """One line a contender."""
    lines = ["| callbacks, every 100 steps | µs a step | steps a second, to none | ms at the end |", "| --- " * 4 + "|"]
    base = [step for step, _ in times[NONE]]
    for name, found in times.items():
        step, end = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(alone / step for alone, (step, _) in zip(base, found, strict=True))
        lines.append(f"| {name} | {step:.2f} | {ratio:.3f} | {end:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--names", nargs="*", default=NAMES, help="of the contenders, beside none")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {options.cores} core(s), {options.steps:,} steps")
    print(table(measure(options.steps, options.repeats, [NONE, *options.names])))


if __name__ == "__main__":
    main()
