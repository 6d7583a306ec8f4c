"""A disk that is full, or cannot be written: a clear error, and the checkpoint before is whole."""

import os
import resource
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch

from guides import mean_field_normal
from inference import Checkpoint, every, fit
from ppl_models import linear_regression

X = torch.linspace(-1, 1, 40).reshape(-1, 1)


def run(folder, **options):
    guide, given = mean_field_normal(linear_regression), {"steps": 200, "lr": 0.01, "engine": "eager", **options}
    kept = None if folder is None else Checkpoint(folder, every=20)
    return fit(linear_regression, guide, X, X[:, 0].cos(), checkpoint=kept, progress=False, **given)


def test_a_file_may_grow_no_further(tmp_path):
    """Writes end with the error that a full disk gives, in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(now):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))

    try:
        with pytest.raises(OSError, match=f"{tmp_path} cannot be written .*make room") as caught:
            run(tmp_path, callbacks=[every(100, full)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caught.value.posterior.losses) == 100
    assert not list(tmp_path.glob(".checkpoint*"))
    again = run(tmp_path, resume=True)
    assert np.array_equal(again.losses, run(None).losses)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root, to mount a small disk")
def test_a_disk_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")

    def fill(now):
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    try:
        with pytest.raises(OSError, match=r"run cannot be written .*No space left.*make room") as caught:
            run(disk / "run", callbacks=[every(100, fill)])
        assert len(caught.value.posterior.losses) == 100
        (disk / "ballast").unlink()
        assert np.array_equal(run(disk / "run", resume=True).losses, run(None).losses)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_becomes_read_only(tmp_path):
    user = os.geteuid()

    def lock(now):
        tmp_path.chmod(0o555)
        if user == 0:  # who may write anywhere
            os.seteuid(65534)

    try:
        with pytest.raises(OSError, match=r"cannot be written .*Permission denied") as caught:
            run(tmp_path, callbacks=[every(100, lock)])
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert len(caught.value.posterior.losses) == 100
    assert np.array_equal(run(tmp_path, resume=True).losses, run(None).losses)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file cannot be written"):
        run(tmp_path / "file")
