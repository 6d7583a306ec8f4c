"""A posterior is loaded without its data, however large that was, and whatever its manifest says it was."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from guides import conditional_normal, full_rank_normal
from inference import fit, load
from inference.storage import posterior_archive
from ppl_models import linear_regression

ROWS = 3000
X = torch.linspace(-1, 1, ROWS).reshape(-1, 1)


def local(x, y=None):
    """A latent of its own for every row."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.1), obs=y)


def fitted(model, guide):
    return fit(model, guide, X, X[:, 0], steps=10, lr=0.01, progress=False)


@pytest.mark.parametrize("build", [AutoNormal, full_rank_normal, lambda m: conditional_normal(m, ["weights", "bias"])])
def test_few_rows_stand_for_many(tmp_path, monkeypatch, build):
    monkeypatch.setattr(posterior_archive, "MOST_BYTES", 10_000)
    posterior = fitted(linear_regression, build(linear_regression))
    found = load(posterior.save(tmp_path / "run"), linear_regression, build(linear_regression))
    assert len(found.args[0]) == posterior_archive.FEW_ROWS
    torch.testing.assert_close(found.predict(X[:9], draws=20).draws, posterior.predict(X[:9], draws=20).draws)


def test_a_guide_of_all_rows_needs_them(tmp_path, monkeypatch):
    posterior = fitted(local, AutoNormal(local))
    folder = posterior.save(tmp_path / "run")
    assert load(folder, local, AutoNormal(local)).predict(X[:9], draws=5).mean.shape == (9,)
    monkeypatch.setattr(posterior_archive, "MOST_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"\(3000,\) float32 in the file and \(1009,\).* the data if shapes depend on"):
        load(folder, local, AutoNormal(local))


@pytest.mark.parametrize("shape", [[2**40, 1], [2**62, 1], [2**63 - 1, 1]])
def test_rows_that_nobody_has_take_no_memory(tmp_path, resealed, shape):
    folder = fitted(linear_regression, AutoNormal(linear_regression)).save(tmp_path / "run")
    arguments = [
        {"name": "x", "shape": shape, "dtype": "float32"},
        {"name": "y", "shape": shape[:1], "dtype": "float32"},
    ]
    resealed(folder / "posterior.json", arguments=arguments)
    found = load(folder, linear_regression, AutoNormal(linear_regression))
    assert found.predict(X[:9], draws=5).mean.shape == (9,)


@pytest.mark.parametrize("shape", [[3, 2**40], [2**62, 2**62], [2**40, 2**20]])
def test_columns_that_nobody_has_are_refused(tmp_path, resealed, shape):
    folder = fitted(linear_regression, AutoNormal(linear_regression)).save(tmp_path / "run")
    resealed(folder / "posterior.json", arguments=[{"name": "x", "shape": shape, "dtype": "float32"}])
    with pytest.raises(ValueError, match="stand-ins are made for at most"):
        load(folder, linear_regression, AutoNormal(linear_regression))
