"""A disk that is full, or cannot be written: a clear error, and the checkpoint before is whole."""

import os
import resource
import subprocess
import sys

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
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_of_its_own(tmp_path, fault):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")

    def spoil(now):
        if fault == "full":
            with (disk / "ballast").open("wb", buffering=0) as file:
                file.write(b"x" * 2**18)
        else:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

    try:
        with pytest.raises(OSError, match="run cannot be written") as caught:
            run(disk / "run", callbacks=[every(100, spoil)])
        assert len(caught.value.posterior.losses) == 100
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        (disk / "ballast").unlink(missing_ok=True)
        assert np.array_equal(run(disk / "run", resume=True).losses, run(None).losses)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file cannot be written"):
        run(tmp_path / "file")
