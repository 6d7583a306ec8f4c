"""Fits that are killed at a random moment, while they write too: they go on, to the numbers of one that never was."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from guides import mean_field_normal
from inference import Checkpoint, fit
from inference.storage.checkpoint import has_checkpoint
from ppl_models import linear_regression
from tests.helpers.torchrun import forked

pytestmark = pytest.mark.slow
KILLS = 100  # of each engine
X = torch.linspace(-1, 1, 40).reshape(-1, 1)
WAYS = {"eager": {"steps": 60, "every": 1}, "compiled": {"steps": 600, "every": 3}}


def numbers(engine, folder, resume=False):
    """All that a fit ends with, as bytes."""
    way = WAYS[engine]
    kept = None if folder is None else Checkpoint(folder, every=way["every"])
    guide = mean_field_normal(linear_regression)
    options = {"steps": way["steps"], "lr": 0.01, "batch_size": 9, "engine": engine, "progress": False}
    posterior = fit(linear_regression, guide, X, X[:, 0].cos(), checkpoint=kept, resume=resume, **options)
    draws = [value.numpy().tobytes() for _, value in sorted(posterior.sample(3).items())]
    return b"".join([posterior.losses.tobytes(), posterior.kl.tobytes(), *draws])


@pytest.mark.parametrize("engine", WAYS)
def test_it_goes_on_bit_for_bit(engine, tmp_path, capsys):
    torch.set_num_threads(1)
    whole = numbers(engine, None)
    moments = random.Random(0)
    seen = {"runs": 0, "killed": 0, "had a checkpoint": 0, "in the middle of a write": 0}
    duration = 60.0
    while seen["killed"] < KILLS:
        number, seen["runs"] = seen["runs"], seen["runs"] + 1
        folder, result = tmp_path / str(number), tmp_path / f"{number}.bin"
        began = time.monotonic()
        child = forked(lambda folder=folder: numbers(engine, folder))
        killed = _kill_at(child, began + (moments.uniform(0.0, duration) if number else 600.0))
        duration = duration if killed else min(duration, time.monotonic() - began)
        seen["killed"] += killed
        seen["had a checkpoint"] += killed and has_checkpoint(folder)
        seen["in the middle of a write"] += killed and (any(folder.glob(".checkpoint*.partial")) or _loose(folder))
        again = forked(lambda f=folder, r=result: r.write_bytes(numbers(engine, f, resume=True)))
        assert os.waitpid(again, 0)[1] == 0, f"run {number} did not go on"
        assert result.read_bytes() == whole, f"run {number} ended elsewhere"
    with capsys.disabled():
        print(f"\n{engine}: {seen}")
    assert seen["had a checkpoint"] > KILLS / 4


def _kill_at(child: int, moment: float) -> bool:
    """Kill a process at a moment, unless it has ended before; whether it was killed."""
    while time.monotonic() < moment:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _loose(folder: Path) -> bool:
    """Whether there are tensors that the manifest does not name: it was killed between the two."""
    files = {path.name for path in folder.glob("checkpoint-*.safetensors")}
    manifest = folder / "checkpoint.json"
    named = manifest.read_text() if manifest.exists() else ""
    return any(name not in named for name in files)


def test_a_state_that_is_a_step_off_is_told_apart(tmp_path):
    """The twin that must fail: the comparison sees one number that differs."""
    whole = np.frombuffer(numbers("eager", None), dtype=np.uint8)
    moved = whole.copy()
    moved[0] ^= 1
    assert whole.tobytes() != moved.tobytes()
    assert numbers("eager", tmp_path) == whole.tobytes()
