"""Export to NumPy: all models of the package agree with torch, and what cannot be exported leaves no file."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import ppl_models
from guides import (
    mean_field_normal,
)
from inference import load as reload
from inference.export.runtime.predictor import load
from tests.helpers.exporting import CASES, S, X, Y, close, fitted, plain

NOT_MODELS = {"Energy", "ExactPosterior", "Scaling"}  # a distribution, a result, and a change of units
ALL = [pytest.param(make, id=f"{name}{i}") for name, makes in CASES.items() for i, make in enumerate(makes)]


def inputs_of(posterior, predictor):
    return [posterior.data[i] for i in range(len(predictor.manifest["inputs"]))]


def test_every_model_of_the_package_is_tried_here():
    assert set(CASES) == set(ppl_models.__all__) - NOT_MODELS


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("make", ALL)
def test_numpy_agrees_with_torch(make, dtype, bound, tmp_path):
    posterior = make(dtype)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=S, seed=3))
    assert predictor.manifest["agreement"] <= bound
    latents = posterior.sample(S, seed=3)
    for name, value in predictor.latents.items():
        np.testing.assert_array_equal(value, latents[name])
    x = inputs_of(posterior, predictor)
    found = predictor.predict(*x, seed=5)
    if not x:
        np.testing.assert_array_equal(found.draws, latents["z"])
        np.testing.assert_allclose(found.variance, latents["z"].var(0, correction=0), rtol=1e-5)
        return
    expected = posterior.predict(*x, draws=S, seed=3)
    if "z" in posterior.sample(1):  # latents of rows are drawn anew
        assert found.draws.shape == expected.draws.shape
        close(found.mean, expected.mean, 0.2)
        return
    for rows in (slice(0, 1), slice(0, 2), slice(4, 30)):
        part, whole = predictor.predict(*(v[rows] for v in x)), expected.draws[:, rows]
        close(part.draws, whole, bound)
    names = ["mean", "variance", "std", "epistemic", "noise"]
    if hasattr(found, "probs"):
        names = ["probs", "entropy"]
        gap = np.abs(found.mutual_information - expected.mutual_information.numpy()).max()
        assert gap <= 5 * bound  # nats, a difference of entropies of order one
        np.testing.assert_array_equal(found.labels, expected.labels)
    for name in names:
        close(getattr(found, name), getattr(expected, name), 5 * bound)


def test_a_loaded_posterior_can_be_exported(tmp_path):
    model = ppl_models.bnn_regression
    posterior = plain(model)(torch.float32)
    posterior.save(tmp_path / "run")
    again = reload(tmp_path / "run", model, mean_field_normal(model))
    found = load(again.export(tmp_path / "predictor.npz", draws=S)).predict(X)
    close(found.draws, posterior.predict(X, draws=S).draws, 1e-6)


def test_an_operator_that_numpy_gets_wrong_leaves_no_file(tmp_path, monkeypatch):
    from inference.export.runtime.operators import OPERATORS

    posterior = plain(ppl_models.bnn_regression)(torch.float32)
    monkeypatch.setitem(OPERATORS, "tanh", lambda x: np.tanh(x) * 1.001)
    with pytest.raises(ValueError, match="differs from torch by"):
        posterior.export(tmp_path / "predictor.npz", draws=5)
    assert not list(tmp_path.iterdir())


def test_an_operator_without_numpy_form_leaves_no_file(tmp_path):
    def bessel(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.special.i0(slope * x[:, 0]), 0.5), obs=y)

    posterior = fitted(bessel, AutoNormal(bessel), X, Y)
    (tmp_path / "predictor.npz").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"aten\.i0\.default"):
        posterior.export(tmp_path / "predictor.npz", draws=5)
    assert [path.name for path in tmp_path.iterdir()] == ["predictor.npz"]
    assert (tmp_path / "predictor.npz").read_bytes() == b"old"


def test_names_that_would_hide_a_module_or_a_file_are_refused(tmp_path):
    posterior = plain(ppl_models.linear_regression)(torch.float32)
    for name in ("numpy.npz", "json.npz", "my-model.npz", "1.npz", "class.npz"):
        with pytest.raises(ValueError, match="another name"):
            posterior.export(tmp_path / name, draws=2)
    (tmp_path / "mine.py").write_text("keep = 1\n")
    with pytest.raises(ValueError, match="not written by export"):
        posterior.export(tmp_path / "mine.npz", draws=2)
    with pytest.raises(ValueError, match=r"\.npz"):
        posterior.export(tmp_path / "predictor.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    posterior.export(tmp_path / "twice.npz", draws=2)
    posterior.export(tmp_path / "twice.npz", draws=3)
    assert load(tmp_path / "twice.npz").manifest["draws"] == 3


def test_an_error_of_the_model_is_raised_after_one_attempt(monkeypatch, tmp_path):
    attempts = []

    def fails(*_):
        attempts.append(1)
        raise KeyError("mine")

    posterior = plain(ppl_models.linear_regression)(torch.float32)
    monkeypatch.setattr("inference.export.npz.export_graph", fails)
    with pytest.raises(KeyError, match="mine"):
        posterior.export(tmp_path / "predictor.npz")
    assert len(attempts) == 1
