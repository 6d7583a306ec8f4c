import pytest
import torch

from inference import archive

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
    archive.write(tmp_path, "state", TENSORS, MANIFEST, schema=2)
    return tmp_path


def test_every_tensor_and_value_comes_back(folder):
    tensors, manifest = archive.read(folder, "state", 2, ("step",))
    assert same(tensors, TENSORS)
    assert manifest == MANIFEST


def test_a_second_write_leaves_one_pair(folder):
    other = folder / "state-copy.safetensors"
    other.write_bytes(b"somebody else's")
    (folder / f".state-{'0' * 16}.safetensors.partial").write_bytes(b"of a write that was cut off")
    archive.write(folder, "state", {"w": torch.ones(2)}, {"step": 4}, schema=2)
    assert archive.read(folder, "state", 2)[1] == {"step": 4}
    other.unlink()
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
