"""Rows larger than memory: what a step costs as they grow, and how much of a slow source is hidden.

    python -m benchmarks.batches --threads 1 [--most 10000000]

First N rows of ten columns on disk, 512 a step, Edward's network widened to ten inputs and 50 units, on both
engines: µs a step after the first thousand, the memory that the fit adds to the process at its peak, and the same in
memory with ``batch_size`` for as long as that fits. The address space is limited (RLIMIT_AS) to 512 MiB more than
the process had before, which is less than the largest file, so that it could be neither loaded nor mapped. Then a
source that waits, or works, for each batch: µs a step of fit alone, of the source alone, of both in turn (as where a
source draws from the process's random numbers, which costs a change of their state too), and of the source read ahead,
beside the slower of fit and source, below which nothing can get.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guides import mean_field_normal
from inference import Progress, batches, fit
from ppl_models import bnn_regression

COLUMNS, BATCH, SPARE, BEFORE = 10, 512, 2**29, 1000
MODEL = partial(bnn_regression, hidden=[50], noise=0.5)
Rows = tuple[np.ndarray, np.ndarray]


def made(folder: Path, rows: int) -> tuple[Path, Path]:
    """Files with ``rows`` rows, written a part at a time."""
    paths = folder / f"x{rows}.npy", folder / f"y{rows}.npy"
    if not paths[0].exists():
        rng = np.random.default_rng(0)
        x = np.lib.format.open_memmap(paths[0], "w+", np.float32, (rows, COLUMNS))
        y = np.lib.format.open_memmap(paths[1], "w+", np.float32, (rows,))
        for begin in range(0, rows, 10**6):
            part = slice(begin, min(rows, begin + 10**6))
            x[part] = rng.standard_normal(x[part].shape, np.float32)
            y[part] = np.sin(x[part, 0]) + 0.5 * rng.standard_normal(len(x[part]), np.float32)
    return paths


def step_cost(data: tuple[Any, ...], steps: int, engine: str, batch_size: int | None = BATCH) -> float:
    """µs a step after the first :data:`BEFORE`."""
    told: list[Progress] = []
    options: dict[str, Any] = {"batch_size": batch_size, "lr": 1e-3, "engine": engine, "progress": False}
    fit(MODEL, mean_field_normal(MODEL), *data, steps=steps + BEFORE, callbacks=[told.append], **options)
    begun = next(now for now in told if now.step >= BEFORE)
    return (told[-1].seconds - begun.seconds) / (told[-1].step - begun.step) * 1e6


def growing(folder: Path, rows: int, engine: str, where: str) -> dict[str, float]:
    """In a process of its own: µs a step, and the MiB that the fit adds at its peak."""
    few, many = made(folder, 10_000), made(folder, rows)
    steps = 20_000 if engine == "compiled" else 2_000
    step_cost(tuple(np.load(path) for path in few) if where == "memory" else (batches(*few),), 100, engine)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if where == "disk":
        resource.setrlimit(resource.RLIMIT_AS, (size + SPARE, size + SPARE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = tuple(np.load(path) for path in many) if where == "memory" else (batches(*many),)
    cost = step_cost(data, steps, engine)
    return {"us": cost, "MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


class Source:
    """Batches that take a while: ``wait`` seconds of waiting, and unpacking where they are ``packed``.

    Those ``in_turn`` draw a number of the process's, so that they are not read ahead.
    """

    def __init__(self, wait: float, packed: int, in_turn: bool = False) -> None:
        self.in_turn = in_turn
        rng = np.random.default_rng(0)
        x = rng.integers(0, 9, (BATCH, COLUMNS)).astype(np.float32)
        self.rows = x, np.sin(x[:, 0])
        self.wait, self.packed = wait, zlib.compress(np.tile(x, (packed, 1)).tobytes()) if packed else b""

    def __iter__(self) -> Iterator[Rows]:
        for _ in range(1000):
            if self.in_turn:
                np.random.random()  # noqa: NPY002 - as a source of somebody may
            if self.packed:
                zlib.decompress(self.packed)
            if self.wait:
                time.sleep(self.wait)
            yield self.rows


def hidden(wait: float, packed: int, engine: str) -> dict[str, float]:
    """µs a step of fit alone, source alone, both in turn, and the source read ahead."""
    source, steps = Source(wait, packed), 3_000 if engine == "compiled" else 1_000
    begun, count = time.perf_counter(), 0
    for _ in source:
        count += 1
    alone = (time.perf_counter() - begun) / count * 1e6
    given = partial(batches, num_data=10**6)
    fitted = step_cost((given([source.rows] * 1000),), steps, engine, None)
    ahead, turn = (step_cost((given(s),), steps, engine, None) for s in (source, Source(wait, packed, True)))
    return {"fit": fitted, "source": alone, "turn": turn, "ahead": ahead}


def apart(kind: str, *arguments: Any) -> dict[str, Any]:
    """Measure in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.batches", "--one", json.dumps([kind, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very file
    if done.returncode:
        return {"failed": 1, "words": done.stderr.strip().splitlines()[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one(kind: str, *arguments: Any) -> dict[str, float]:
    """Take the measurement that :func:`apart` starts."""
    torch.set_num_threads(int(arguments[-1]))
    if kind == "growing":
        folder, rows, engine, where = arguments[:-1]
        return growing(Path(folder), rows, engine, where)
    return hidden(*arguments[:-1])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=int, default=10**7)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one if left out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*json.loads(options.one))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print("engine    where        rows   file, MB   µs a step   MiB added")
        for engine in ("compiled", "eager"):
            for where in ("disk", "memory"):
                for rows in (n for n in (10**4, 10**5, 10**6, 10**7, 10**8) if n <= options.most):
                    made(Path(folder), 10_000)
                    size = sum(path.stat().st_size for path in made(Path(folder), rows)) / 1e6
                    found = apart("growing", folder, rows, engine, where, options.threads)
                    figures = found.get("words") or f"{found['us']:9.1f} {found['MiB']:11.0f}"
                    print(f"{engine:<9} {where:<7} {rows:>10,} {size:10.1f}   {figures}", flush=True)
    print("engine    source                    fit   source  in turn    ahead   ahead/slower")
    for engine in ("compiled", "eager"):
        for label, wait, packed in (
            *((f"waits {ms} ms", ms / 1000, 0) for ms in (0.2, 1, 5)),
            *((f"unpacks {n * BATCH * COLUMNS * 4 // 1000} kB", 0.0, n) for n in (10, 100)),
        ):
            found = apart("hidden", wait, packed, engine, options.threads)
            fitted, alone, turn, ahead = (found[name] for name in ("fit", "source", "turn", "ahead"))
            ratio = ahead / max(fitted, alone)
            figures = f"{fitted:8.0f} {alone:8.0f} {turn:8.0f} {ahead:8.0f} {ratio:14.2f}"
            print(f"{engine:<9} {label:<20} {figures}", flush=True)


if __name__ == "__main__":
    main()
