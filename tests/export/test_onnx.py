"""Export of the mean to ONNX."""

import importlib.util

import pytest
import torch

import ppl_models
from tests.helpers.exporting import CASES, S, close, plain, vae


# ONNX, where the packages are there.
@pytest.mark.parametrize("name", ["bnn_regression", "DropoutNetwork", "DropoutCNN"])
@pytest.mark.filterwarnings("ignore")
def test_the_mean_as_onnx(name, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    posterior = CASES[name][0](torch.float32)
    session = runtime.InferenceSession(str(posterior.export(tmp_path / "mean.onnx", draws=S)))
    assert [path.name for path in tmp_path.iterdir()] == ["mean.onnx"]
    for rows in (1, 3, 30):
        x = posterior.data[0][:rows]
        first, *more = session.run(None, {"x": x.numpy()})
        expected = posterior.predict(x, draws=S)
        close(first, expected.probs if name == "DropoutCNN" else expected.mean, 2e-6)
        for variance in more:
            close(variance, expected.variance, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_random_numbers_are_no_onnx(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="random numbers"):
        vae(None)(torch.float32).export(tmp_path / "mean.onnx", draws=3)
    assert not list(tmp_path.iterdir())


def test_without_its_packages_onnx_says_what_to_install(tmp_path, monkeypatch):
    posterior = plain(ppl_models.linear_regression)(torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        posterior.export(tmp_path / "mean.onnx", draws=3)
    assert not list(tmp_path.iterdir())
