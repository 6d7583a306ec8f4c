"""Errors of an export to ONNX: refusals of torch's exporter have a message of their own, others stay as they are."""

import pytest
import torch

from guides import mean_field_normal
from inference import fit
from ppl_models import linear_regression

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def posterior(line):
    guide = mean_field_normal(linear_regression)
    return fit(linear_regression, guide, line.x, line.y, steps=5, engine="eager", progress=False)


def refusing(error):
    def export(*args, **options):
        raise error

    return export


@pytest.mark.parametrize("error", [torch.onnx.OnnxExporterError("no such operator"), RuntimeError("no such operator")])
def test_what_the_exporter_refuses_is_said_in_one_line(posterior, tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch.onnx, "export", refusing(error))
    with pytest.raises(ValueError, match="torch cannot write this model as ONNX: no such operator"):
        posterior.export(tmp_path / "mean.onnx", draws=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyError("a mistake of our own"), OSError("No space left on device")])
def test_other_errors_are_not_taken_for_a_refusal(posterior, tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch.onnx, "export", refusing(error))
    with pytest.raises(type(error)):
        posterior.export(tmp_path / "mean.onnx", draws=5)
    assert not list(tmp_path.iterdir())
