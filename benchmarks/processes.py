"""Steps a second of one fit by 1, 2 and 4 processes, and the share of them that the exchange takes.

    python -m benchmarks.processes --threads 1

Starts torchrun by itself, on this machine. Two works: a network on all of
200,000 rows a step, and a wide one on 1,000 of them a step. Each repeat runs every
contender once, in turn, so that a change of the machine's speed meets them all;
medians. The exchange includes the wait for the slowest process. One process
with as many threads as there are processes is what they are to be compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from guides import mean_field_normal
from inference.engine.compiled import CompiledEngine
from inference.engine.eager import EagerEngine
from inference.engine.process_group import ProcessGroup, gathered
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.utils.random_state import RandomStream
from ppl_models import bnn_regression

WORKS: dict[str, tuple[tuple[int, ...], int | None]] = {"all rows": ((20,), None), "1,000 rows": ((200, 200), 1_000)}
ENGINES = ("eager", "compiled")
COLUMNS, FIRST = 10, 5


@contextmanager
def clock() -> Iterator[list[float]]:
    """The seconds that this process spends in the exchange, its waits included, as one number that grows."""
    spent, total = [0.0], ProcessGroup.total

    def timed(group: ProcessGroup, values: Tensor) -> Tensor:
        began = time.perf_counter()
        found = total(group, values)
        spent[0] += time.perf_counter() - began
        return found

    with mock.patch.object(ProcessGroup, "total", timed):
        yield spent


def work(name: str, engine: str, rows: int, seconds: float) -> dict[str, float]:
    """Steps a second and the share of the exchange, at this process."""
    hidden, batch_size = WORKS[name]
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0))
    model, stream = partial(bnn_regression, hidden=hidden), RandomStream.seeded(0)
    with gathered(torch.device("cpu")) as group:
        args = (x, x.sum(1).sin())
        bound_model = BoundModel.start(
            model, mean_field_normal(model), args, stream, torch.device("cpu"), torch.float32, batch_size=batch_size
        )
        problem = SVIProblem.on(bound_model, InMemory(args, batch_size), lr=1e-4)
        problem = problem if group is None else problem.sharded(group)
        runner: Any = CompiledEngine(problem, stream) if engine == "compiled" else EagerEngine(problem)
        state = runner.init(stream)
        runner.advance(state, FIRST)
        if group is not None:
            group.most(0)
        began = time.perf_counter()
        runner.advance(state, FIRST)
        steps = max(FIRST, round(FIRST * seconds / (time.perf_counter() - began)))
        steps = steps if group is None else group.most(steps)[0]
        with clock() as exchange:
            began = time.perf_counter()
            runner.advance(state, steps)
            taken = time.perf_counter() - began
    return {"rate": steps / taken, "exchange": exchange[0] / taken}


def contender(processes: int, threads: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the results of the first of so many processes, of so many threads each, for each work and engine."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--no-python"]
        given = ["--rows", str(options.rows), "--seconds", str(options.seconds), "--threads", str(threads)]
        command = [*launcher, sys.executable, "-m", "benchmarks.processes", "--write", str(found), *given]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, capture_output=True)  # noqa: S603 - this file
        read: dict[str, dict[str, float]] = json.loads(found.read_text())
        return read


def measure(options: argparse.Namespace) -> str:
    """The table, one line a contender and work."""
    who = [(1, options.threads)]
    who += [(1, count * options.threads) for count in options.counts if count > 1]
    who += [(count, options.threads) for count in options.counts if count > 1]
    found: dict[tuple[int, int], list[dict[str, dict[str, float]]]] = {one: [] for one in who}
    with tqdm(total=options.repeats * len(who), unit="run", leave=False) as bar:
        for _ in range(options.repeats):
            for one in who:
                found[one].append(contender(*one, options))
                bar.update()
    heads = ["work", "engine", "processes", "threads each", "steps a second", "to one process", "in the exchange"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for key in found[who[0]][0]:
        base = statistics.median(run[key]["rate"] for run in found[who[0]])
        for one in who:
            rate, exchange = (statistics.median(run[key][name] for run in found[one]) for name in ("rate", "exchange"))
            cells = [*key.split("/"), *map(str, one), f"{rate:,.1f}", f"{rate / base:.2f}", f"{exchange:.1%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def take_part(options: argparse.Namespace) -> None:
    """Be one of the processes; the first writes what it found."""
    torch.set_num_threads(options.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    found = {f"{name}/{e}": work(name, e, options.rows, options.seconds) for name in WORKS for e in ENGINES}
    if os.environ.get("RANK", "0") == "0":
        options.write.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2, 4], help="of processes")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each work and engine in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        take_part(options)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo")
    print(measure(options))


if __name__ == "__main__":
    main()
