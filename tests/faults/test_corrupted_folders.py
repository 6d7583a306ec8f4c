"""Folders from elsewhere, or from a damaged disk: none is believed, run or waited for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inference.storage import json_document, tensor_archive
from tests.faults import corrupted_folders, corruptions

ROOT = Path(__file__).parents[2]


def test_harmed_folders_are_refused_or_load_to_what_was_written(tmp_path):
    tally = corrupted_folders.run_all(120, 1, tmp_path)
    assert tally.wrong == []
    assert tally.peak < corrupted_folders.BYTES
    assert tally.ends["refused"] > 50
    assert tally.ends["loaded"] > 0


@pytest.mark.slow
def test_five_thousand_harmed_folders():
    words = [sys.executable, "-m", "tests.faults.corrupted_folders", "--count", "5000"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["posterior", "run", "checkpoint"])
def test_without_checksums_wrong_values_get_through(kind, tmp_path, monkeypatch):
    """One bit of a tensor: found by the checksum, and by nothing else."""
    write, read = corrupted_folders.KINDS[kind]
    write(tmp_path / "whole", 0)
    wanted = read(tmp_path / "whole")
    (path,) = (tmp_path / "whole").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read(tmp_path / "whole")
    monkeypatch.setattr(tensor_archive, "refuse_damage", lambda *_: None)
    assert not corrupted_folders.same(read(tmp_path / "whole"), wanted)


def test_without_checksums_a_changed_digit_gets_through(tmp_path, monkeypatch):
    write, read = corrupted_folders.KINDS["posterior"]
    write(tmp_path / "whole", 0)
    path = tmp_path / "whole" / "posterior.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"posterior\.json is damaged \(its checksum"):
        read(tmp_path / "whole")
    monkeypatch.setattr(json_document, "refuse_damage", lambda *_: None)
    assert read(tmp_path / "whole")[-1].seed == 1


def test_a_pickle_that_is_opened_is_noticed(tmp_path):
    """The trap works: this is what no reader of Kiln's does."""
    torch.save(corruptions.Canary(tmp_path / "canary"), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "canary").exists()
