"""Predictions of many rows: time and memory on the way to disk, beside Pyro's own ``Predictive``.

    python -m benchmarks.prediction --threads 1 [--rows 1000000] [--draws 1000] [--folder DIR]

Edward's network at more and more rows, each in a process of its own: Kiln with ``out=``, all draws and a summary
alone, and in one piece; Pyro's ``Predictive`` one draw after the other, and with ``parallel=True`` on the same
network written for it, of which the observations alone are asked for. Seconds, millions of rows times draws a
second, and MiB at the peak beyond what the process had after the fit. The address space is limited (RLIMIT_AS) to
``--limit`` GiB more than that; who needs more fails, and is not asked for more rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from guides import mean_field_normal
from inference import Posterior, fit
from ppl_models import bnn_regression
from ppl_models.data.datasets import cosine

SIZES = (10**3, 10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7)
Work = Callable[[np.ndarray], object]


def network(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Edward's network, written for draws in front of all dimensions."""
    rows, sizes = x, (x.shape[1], 10, 10, 1)
    for i in range(3):
        weights = pyro.sample(f"w{i}", dist.Normal(x.new_zeros(sizes[i], sizes[i + 1]), 1.0).to_event(2))
        bias = pyro.sample(f"b{i}", dist.Normal(x.new_zeros(sizes[i + 1]), 1.0).to_event(1))
        rows = rows @ weights + bias[..., None, :]
        rows = rows.tanh() if i < 2 else rows
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(rows[..., 0], 0.1), obs=y)


def of_kiln(draws: int, out: Path | None, keep: str) -> Work:
    """A posterior of a short fit, asked for functions and samples."""
    table = cosine()
    posterior: Posterior = fit(
        bnn_regression, mean_field_normal(bnn_regression), table.x, table.y, steps=500, lr=0.02, progress=False
    )
    if out is None:
        return lambda x: posterior.predict(x, draws=draws, progress=False)
    return lambda x: posterior.predict(x, draws=draws, out=out, keep=keep, progress=False)


def of_pyro(draws: int, parallel: bool) -> Work:
    """A guide of as short a fit by Pyro, asked for samples."""
    table = cosine()
    x, y = (torch.as_tensor(values, dtype=torch.float32) for values in (table.x, table.y))
    guide = AutoNormal(network)
    svi = SVI(network, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(500):
        svi.step(x, y)
    asked = Predictive(network, guide=guide, num_samples=draws, return_sites=("y",), parallel=parallel)

    def work(x: np.ndarray) -> object:
        with torch.no_grad():
            return asked(torch.from_numpy(x))["y"]

    return work


KINDS: dict[str, Callable[[int, Path], Work]] = {
    "Kiln, all draws to disk": lambda draws, out: of_kiln(draws, out, "draws"),
    "Kiln, summary to disk": lambda draws, out: of_kiln(draws, out, "summary"),
    "Kiln, in one piece": lambda draws, out: of_kiln(draws, None, "draws"),
    "Pyro, draw by draw": lambda draws, out: of_pyro(draws, False),
    "Pyro, parallel=True": lambda draws, out: of_pyro(draws, True),
}


def _memory(name: str) -> float:
    """VmRSS, VmHWM or VmSize of this process, in MiB."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(found.split()[1]) / 1024


def one(kind: str, rows: int, draws: int, limit: float, folder: str, threads: int) -> dict[str, float]:
    """In a process of its own: seconds, and MiB beyond those after the fit."""
    torch.set_num_threads(threads)
    out = Path(folder) / "prediction.zarr"
    work = KINDS[kind](draws, out)
    x = np.random.default_rng(0).uniform(-3, 3, (rows, 1)).astype(np.float32)
    most = int(_memory("VmSize") * 2**20 + limit * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, begun = _memory("VmRSS"), time.perf_counter()
    kept = work(x)
    seconds = time.perf_counter() - begun
    del kept
    return {"seconds": seconds, "MiB": _memory("VmHWM") - before}


def apart(*arguments: Any) -> dict[str, Any]:
    """Measure in a fresh process, and return the reason if that fails."""
    with tempfile.TemporaryDirectory(dir=arguments[-2]) as folder:
        given = json.dumps([*arguments[:-2], folder, arguments[-1]])
        command = [sys.executable, "-m", "benchmarks.prediction", "--one", given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very file
        if done.returncode:
            words = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
            return {"failed": words[:70]}
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return dict(json.loads(done.stdout.splitlines()[-1])) | {"disk": size / 2**20}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=10**6, help="the most rows")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of addresses beyond those after the fit")
    parser.add_argument("--folder", help="where the predictions go; a temporary one if left out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*json.loads(options.one))))
        return
    print(f"{'':<26} {'rows':>10} {'draws':>7} {'seconds':>9} {'10⁶/s':>7} {'MiB':>8} {'on disk':>9}")
    for kind in KINDS:
        for rows in (size for size in SIZES if size <= options.rows):
            found = apart(kind, rows, options.draws, options.limit, options.folder, options.threads)
            if "failed" in found:
                print(f"{kind:<26} {rows:>10,} {options.draws:>7,}   {found['failed']}", flush=True)
                break
            pace = rows * options.draws / found["seconds"] / 1e6
            figures = f"{found['seconds']:>9.1f} {pace:>7.2f} {found['MiB']:>8.0f} {found['disk']:>9.0f}"
            print(f"{kind:<26} {rows:>10,} {options.draws:>7,} {figures}", flush=True)


if __name__ == "__main__":
    main()
