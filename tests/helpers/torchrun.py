"""Processes for a test: forked, alone or with a process group, or started by torchrun."""

import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]


def forked(work):
    """A process that does ``work()`` and ends with status 0 if nothing was raised; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def together(count, folder, work, seconds=120):
    """What ``work(rank)``, a dict of arrays, gives at each of ``count`` processes of one group."""
    folder.mkdir(exist_ok=True)
    children = [os.fork() or _be(rank, count, folder, work) for rank in range(count)]
    left, last = set(children), time.monotonic() + seconds
    while left and time.monotonic() < last:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.01)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not left, f"{len(left)} of {count} processes were still there after {seconds} seconds"
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(count)]


def _be(rank, count, folder, work):
    """Be one of the processes: never returns."""
    status = 1
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=timedelta(seconds=60)
        )
        np.savez(folder / f"{rank}.npz", **work(rank))
        status = 0
    except BaseException:  # a fork must not go on as the test that it came from
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


_OFTEN = """
import sys
import torch
from inference import checkpoint, cli
checkpoint._SECONDS = 0.5
torch.set_default_dtype(torch.float64)
sys.exit(cli.main(sys.argv[1:]))
"""


def torchrun(*command, count, log, options=(), before=(), **environment):
    """The command line with these words in ``count`` processes; the launcher, whose output goes to ``log``.

    There is a checkpoint every half a second, not half a minute, and numbers are double.
    """
    script = log.with_suffix(".py")
    script.write_text(_OFTEN)
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(count)]
    where = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with log.open("w") as stream:
        words = [*before, *launcher, str(script), *map(str, command)]
        return subprocess.Popen(words, env=where, stdout=stream, stderr=subprocess.STDOUT)


def process_of(launcher, rank, seconds=60):
    """The number of the process ``rank`` that a launcher started, once it is there."""
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
        time.sleep(0.05)
    raise AssertionError(f"process {rank} did not start")
