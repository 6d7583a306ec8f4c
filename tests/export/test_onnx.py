"""Export of the mean to ONNX: refusals of torch's exporter have a message of their own, others stay as they are."""

import importlib.util

import pytest
import torch

import ppl_models
from guides import mean_field_normal
from inference import fit
from ppl_models import linear_regression
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
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name if "onnx" in name else find(name, *_))
    with pytest.raises(ValueError, match="random numbers"):
        vae(None)(torch.float32).export(tmp_path / "mean.onnx", draws=3)
    assert not list(tmp_path.iterdir())


def test_without_its_packages_onnx_says_what_to_install(tmp_path, monkeypatch):
    posterior = plain(ppl_models.linear_regression)(torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        posterior.export(tmp_path / "mean.onnx", draws=3)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def exporter():
    """Skip a test without the packages that torch's exporter needs."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def posterior(line):
    guide = mean_field_normal(linear_regression)
    return fit(linear_regression, guide, line.x, line.y, steps=5, engine="eager", progress=False)


def refusing(error):
    def export(*args, **options):
        raise error

    return export


@pytest.mark.parametrize("error", [torch.onnx.OnnxExporterError("no such operator"), RuntimeError("no such operator")])
@pytest.mark.usefixtures("exporter")
def test_what_the_exporter_refuses_is_said_in_one_line(posterior, tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch.onnx, "export", refusing(error))
    with pytest.raises(ValueError, match="torch cannot write this model as ONNX: no such operator"):
        posterior.export(tmp_path / "mean.onnx", draws=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyError("a mistake of our own"), OSError("No space left on device")])
@pytest.mark.usefixtures("exporter")
def test_other_errors_are_not_taken_for_a_refusal(posterior, tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch.onnx, "export", refusing(error))
    with pytest.raises(type(error)):
        posterior.export(tmp_path / "mean.onnx", draws=5)
    assert not list(tmp_path.iterdir())
