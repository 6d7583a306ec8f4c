import hashlib
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file

from inference.storage import (
    atomic_files,
    json_document,
    tensor_archive,
)

MANIFEST = {"step": 3, "loss": [1.5, None], "name": "é\ud800", "state": 2**128 - 1}
TENSORS = {
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "empty": torch.zeros(0, 5),
    "scalar": torch.tensor(-0.0),
    "bool": torch.tensor([True, False, True]),
    "strided": torch.arange(9)[::2],
    "bytes": torch.arange(255, dtype=torch.uint8),
    "double": torch.tensor([float("nan"), float("inf"), 5e-324], dtype=torch.float64),
    "half": torch.tensor([1.0, 1e-3]).bfloat16(),
    "expanded": torch.ones(1).expand(3),
    "learned": torch.nn.Parameter(torch.ones(2, 2)),
}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype
        and found[name].shape == value.shape
        and found[name].numpy(force=True).tobytes() == value.contiguous().numpy(force=True).tobytes()
        if value.dtype != torch.bfloat16
        else torch.equal(found[name], value)
        for name, value in wanted.items()
    )


@pytest.fixture
def folder(tmp_path):
    tensor_archive.write(tmp_path, "state", TENSORS, MANIFEST, schema=2)
    return tmp_path


def test_every_tensor_and_value_comes_back(folder):
    tensors, manifest = tensor_archive.read(folder, "state", 2, ("step",))
    assert same(tensors, TENSORS)
    assert manifest == MANIFEST


def test_a_second_write_leaves_one_pair(folder):
    other = folder / "state-copy.safetensors"
    other.write_bytes(b"somebody else's")
    (folder / f".state-{'0' * 16}.safetensors.partial").write_bytes(b"of a write that was cut off")
    tensor_archive.write(folder, "state", {"w": torch.ones(2)}, {"step": 4}, schema=2)
    assert tensor_archive.read(folder, "state", 2)[1] == {"step": 4}
    other.unlink()
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_the_tensors_are_a_safetensors_file_that_others_read(folder):
    (path,) = folder.glob("*.safetensors")
    assert same(load_file(path), TENSORS)


def test_tensors_that_share_memory_are_kept_each_for_itself(tmp_path):
    whole = torch.arange(6.0)
    shared = {"whole": whole, "again": whole, "part": whole[2:5], "row": whole.reshape(2, 3)[1]}
    tensor_archive.write(tmp_path, "state", shared, {}, schema=1)
    assert same(tensor_archive.read(tmp_path, "state", 1)[0], shared)


def forged(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        forged({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        forged({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)),
        forged({"w": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
        forged({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, bytes(4)),
        forged({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        forged({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(5)),
        forged({"\x1b[2J": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        (2**40).to_bytes(8, "little") + b"{}",
        b"{}",
        b"",
    ],
)
def test_a_forgery_with_the_right_checksum_is_refused(tmp_path, content):
    digest = hashlib.sha256(content).hexdigest()
    name = f"state-{digest[:16]}.safetensors"
    (tmp_path / name).write_bytes(content)
    entry = {"file": name, "bytes": len(content), "sha256": digest}
    json_document.write_json(tmp_path / "state.json", {"tensors": entry}, schema=1)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged \([^\x1b]*\): take it from a backup"):
        tensor_archive.read(tmp_path, "state", 1)


CALLS = ("open", "fsync", "replace", "listdir", "unlink")


def killed_at(call, work):
    """``work`` in a process of its own, which ends without a word at the call of that number."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = iter(range(call))

    def dying(real):
        return lambda *args, **kwargs: real(*args, **kwargs) if next(left, None) is not None else os._exit(9)

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    try:
        work()
    finally:
        os._exit(0)


def test_the_old_pair_or_the_new_one_stands_wherever_the_process_dies(folder):
    """The process is killed before each call that reaches the disk, in turn."""
    ends, call = [], 0
    while not ends or ends[-1][0] == 9:
        tensor_archive.write(folder, "state", TENSORS, MANIFEST, schema=2)
        status = killed_at(
            call, lambda: tensor_archive.write(folder, "state", {"w": torch.ones(3)}, {"step": 4}, schema=2)
        )
        tensors, manifest = tensor_archive.read(folder, "state", 2)
        old = manifest == MANIFEST and same(tensors, TENSORS)
        new = manifest == {"step": 4} and same(tensors, {"w": torch.ones(3)})
        assert old or new
        ends.append((status, new))
        call += 1
    assert len(ends) > 8
    assert [new for _, new in ends] == sorted(new for _, new in ends)
    assert not ends[0][1]


@pytest.mark.parametrize(("name", "which"), [*(("replace", i) for i in range(2)), *(("fsync", i) for i in range(4))])
def test_a_write_that_fails_leaves_the_old_pair_and_nothing_else(folder, name, which, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, left = getattr(os, name), iter(range(which))

    def failing(*args):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, name, failing)
    with pytest.raises(OSError, match=rf"{folder} cannot be written \(No space left on device\): make room there"):
        tensor_archive.write(folder, "state", {"w": torch.ones(3)}, {"step": 4}, schema=2)
    monkeypatch.undo()
    if tensor_archive.read(folder, "state", 2)[1] == MANIFEST:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    else:  # the last wait failed, when the new pair was there
        assert (name, which, len(list(folder.iterdir()))) == ("fsync", 3, 2)


def test_no_archive_is_told_from_a_damaged_one(tmp_path):
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match=r"state\.json is not there"):
            tensor_archive.read(place, "state", 2)


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(OSError, match=rf"{re.escape(str(tmp_path / 'gone'))} cannot be written \(No such file"):
        tensor_archive.write(tmp_path / "gone", "state", TENSORS, MANIFEST, schema=2)


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"tensor 'c' is torch\.complex64"):
        tensor_archive.write(tmp_path, "state", {"c": torch.ones(1, dtype=torch.complex64)}, {}, schema=1)
    for manifest in ({"tensors": 1}, {"schema": 1}, {"sha256": 1}, {"loss": float("nan")}):
        with pytest.raises(ValueError, match=r"state\.json"):
            tensor_archive.write(tmp_path, "state", {}, manifest, schema=1)
    monkeypatch.setattr(tensor_archive, "_MOST", 100)
    with pytest.raises(ValueError, match=r"state would have .* bytes of tensors, and at most 100 are read"):
        tensor_archive.write(tmp_path, "state", TENSORS, {}, schema=1)
    assert not list(tmp_path.iterdir())


def test_another_schema_and_a_missing_key_are_named(folder):
    with pytest.raises(ValueError, match="has schema 2, and this version of kiln-ppl reads 3: use the version that"):
        tensor_archive.read(folder, "state", 3)
    with pytest.raises(ValueError, match=r"lacks \['losses'\]"):
        tensor_archive.read(folder, "state", 2, ("losses", "step"))


def test_a_file_that_changes_its_size_is_not_read(folder):
    (path,) = folder.glob("*.safetensors")
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match=r"it has 1,099,511,627,776 bytes, not the [0-9,]+ that were written"):
        tensor_archive.read(folder, "state", 2)
    with (folder / "state.json").open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"has 1,099,511,627,776 bytes, and at most 4,194,304 are read"):
        tensor_archive.read(folder, "state", 2)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_opened(folder, make):
    path = folder / "state.json"
    path.unlink()
    make(path)
    with pytest.raises(ValueError, match=r"state\.json is (no regular file|a link)"):
        tensor_archive.read(folder, "state", 2)


def test_a_link_at_a_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.json.partial").symlink_to(tmp_path / "mine")
    json_document.write_json(tmp_path / "x.json", {"a": 1}, schema=1)
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(ValueError, match="is no regular file"):
        atomic_files.read_bytes(tmp_path, 10)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"name": 3, "sizes": [1]}, "does not have text at name"),
        ({"name": "a", "sizes": [1, True]}, r"a whole number from 0 at sizes\[1\]"),
        ({"name": "a", "sizes": [2**63]}, r"a whole number from 0 at sizes\[0\]"),
        ({"name": "a", "sizes": [1] * 65}, "a list of at most 64 sizes at sizes"),
        ({"name": "a"}, "an object of name, sizes"),
        ({"name": "a", "sizes": [], "more": 1}, "an object of name, sizes"),
        ([], "an object"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named_with_its_file(tmp_path, value, complaint):
    kind = json_document.record(name=json_document.TEXT, sizes=json_document.SHAPE)
    json_document.check(tmp_path, {"name": "a", "sizes": [1, 2]}, kind)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} does not have .*{complaint.split('have ')[-1]}"):
        json_document.check(tmp_path, value, kind)
