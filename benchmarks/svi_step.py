"""Microseconds a step of SVI, Adam included: Pyro, torch by hand, Kiln's two engines, NumPyro or JAX.

    pip install -c constraints.txt -e ".[bench]"
    python -m benchmarks.svi_step --threads 1

Each repeat times every contender once, in turn, so that a change of the
machine's speed meets them all; medians and ratios of medians are printed. On
two threads the process is bound to two cores, on one to one.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import Trace_ELBO
from tqdm import tqdm

from benchmarks.baselines.torch import BY_HAND, by_hand
from benchmarks.problems import WORKS, Work
from inference.engine.compiled import CompiledEngine
from inference.engine.eager import EagerEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.utils.random_state import RandomStream

Steps = Callable[[int], object]
JAX, PYRO, EAGER, COMPILED, TORCH, TORCH_COMPILE = "JAX", "Pyro", "eager", "compiled", "torch", "torch.compile"


def by_pyro(work: Work) -> Steps:
    """Loop of Pyro's documentation: ``SVI``, ``pyro.optim.Adam``, ``Trace_ELBO``."""
    pyro.clear_param_store()
    loss = Trace_ELBO(num_particles=work.particles, vectorize_particles=work.particles > 1)
    svi = PyroSVI(work.model, work.guide, pyro.optim.Adam({"lr": work.lr}), loss)

    def run(steps: int) -> None:
        for _ in range(steps):
            svi.step(*work.args)

    return run


def by_kiln(work: Work, compiled: bool, device: str) -> Steps:
    """Engines of ``fit``, without its progress bar."""
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(work.model, work.guide, work.args, stream, torch.device(device), torch.float32)
    problem = SVIProblem.on(bound_model, InMemory(work.args), lr=work.lr, particles=work.particles)
    engine: Any = CompiledEngine(problem, stream) if compiled else EagerEngine(problem)
    state = engine.init(stream)
    return lambda steps: engine.advance(state, steps)


def contenders(name: str, device: str, with_jax: bool) -> dict[str, Callable[[], Steps]]:
    """Contenders that are timed on one work; eager Kiln is left out where it has no batch of particles to offer."""
    make = WORKS[name]
    found: dict[str, Callable[[], Steps]] = {
        PYRO: lambda: by_pyro(make().to(device)),
        COMPILED: lambda: by_kiln(make().to(device), True, device),
    }
    if make().particles == 1:
        found[EAGER] = lambda: by_kiln(make().to(device), False, device)
    if device == "cpu":
        found[TORCH] = lambda: by_hand(BY_HAND[name], compiled=False)
        found[TORCH_COMPILE] = lambda: by_hand(BY_HAND[name], compiled=True)
    if with_jax:
        from benchmarks.baselines.jax import RIVALS

        found[JAX] = RIVALS[name][1]
    return found


def measure(runs: dict[str, Steps], seconds: float, repeats: int, bar: tqdm[Any]) -> dict[str, list[float]]:
    """Microseconds a step, one figure a repeat, the contenders in turn, each for about ``seconds``."""
    steps = {}
    for name, run in runs.items():
        run(10)
        start = time.perf_counter()
        run(10)
        steps[name] = max(10, round(seconds / (time.perf_counter() - start) * 10))
        run(steps[name])  # compiled loops are compiled for their length
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(steps[name])
            times[name].append((time.perf_counter() - start) / steps[name] * 1e6)
        bar.update()
    return times


def report(name: str, times: dict[str, list[float]]) -> str:
    """One line of the table."""
    medians = {key: statistics.median(values) for key, values in times.items()}
    order = (PYRO, TORCH, TORCH_COMPILE, EAGER, COMPILED, JAX)
    cells = [f"{medians[key]:,.1f}" if key in medians else "–" for key in order]
    ratios = [
        f"{medians[COMPILED] / medians[JAX]:.2f}" if JAX in medians else "–",
        f"{medians[PYRO] / medians[COMPILED]:,.1f}",
        f"{medians[COMPILED] / medians[TORCH_COMPILE]:.2f}" if TORCH_COMPILE in medians else "–",
    ]
    return "| " + " | ".join([name, *cells, *ratios]) + " |"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each contender in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--works", nargs="*", choices=list(WORKS), default=list(WORKS))
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity") and options.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)

    print(f"{platform.machine()}, torch {torch.__version__}, Pyro {pyro.__version__}, {options.threads} thread(s)")
    heads = [PYRO, TORCH, TORCH_COMPILE, "Kiln eager", "Kiln compiled", "NumPyro or JAX"]
    ratios = ["compiled / JAX", "Pyro / compiled", "compiled / torch.compile"]
    lines = ["| " + " | ".join(["µs a step", *heads, *ratios]) + " |", "| " + " | ".join(["---"] * 10) + " |"]
    with tqdm(total=len(options.works) * options.repeats, unit="repeat", leave=False) as bar:
        for name in options.works:
            bar.set_description(name)
            made = contenders(name, options.device, with_jax=options.device == "cpu")
            runs = {key: make() for key, make in made.items()}
            lines.append(report(name, measure(runs, options.seconds, options.repeats, bar)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
