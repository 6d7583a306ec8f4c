"""Models of users as one function of their inputs: which are exported, and how."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn

from guides import (
    planar_flow,
    spline_flow,
)
from inference.export.runtime.predictor import load
from tests.helpers.exporting import S, X, Y, close, fitted


# Users' models.
def with_plate(x, y=None):
    """Groups by an index, a plate's own index, two inputs in one, a Student-t likelihood."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)) as rows:
        pyro.sample("y", dist.StudentT(5.0, level[x[rows, 0].long() % 4] + x[:, 1], scale), obs=y)


def counts(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((slope * x[:, 0]).exp()), obs=y)


def classes(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


def yes_or_no(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def of_rows(x, y=None):
    """Each row has a level of its own, which an autoguide knows for the rows of the fit alone."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(0.3))
    with pyro.plate("data", len(x)):
        level = pyro.sample("level", dist.Normal(slope * x[:, 0], spread))
        pyro.sample("y", dist.Normal(level, 0.1), obs=y)


def branching(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    mean = slope * x[:, 0] if slope.item() > -100 else x[:, 1]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def gaussian_process(x, y=None):
    """A weight at each of five places, and a kernel from there to the rows."""
    length = pyro.sample("length", dist.LogNormal(0.0, 0.3))
    places = torch.linspace(-2, 2, 5)
    weights = pyro.sample("weights", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    mean = (-(((x[:, :1] - places) / length) ** 2)).exp() @ weights
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Gamma(mean.exp(), 1.0), obs=y)


def heavy(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Cauchy(slope * x[:, 0], 0.1), obs=y)


def weighted(x, w, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x[:, 0] + w, 0.5), obs=y)


class Module(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = pyro.nn.PyroModule[nn.Linear](3, 1)
        self.linear.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, x, y=None):
        mean = self.linear(x)[:, 0]
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def filling(x, y=None):
    """What torch.vmap cannot run, so that draws are run one by one."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    mean = torch.zeros(len(x))
    mean[:] = slope * x[:, 0]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


THEIRS = {
    "plate": (with_plate, AutoNormal, (X.abs() * 3, Y)),
    "counts": (counts, AutoNormal, (X, Y.abs().round())),
    "classes": (classes, AutoNormal, (X, torch.arange(30) % 4)),
    "yes or no": (yes_or_no, AutoNormal, (X, (Y > 0).float())),
    "a point": (yes_or_no, AutoDelta, (X, (Y > 0).float())),
    "filling": (filling, AutoNormal, (X, Y)),
    "process": (gaussian_process, AutoNormal, (X, Y.abs() + 0.1)),
    "planar": (counts, partial(planar_flow, layers=2), (X, Y.abs().round())),
    "spline": (classes, spline_flow, (X, torch.arange(30) % 4)),
    "two inputs": (weighted, AutoNormal, (X, X[:, 1], Y)),
    "module": (Module(), AutoNormal, (X, Y)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_users_models_agree(name, tmp_path):
    model, build, data = THEIRS[name]
    posterior = fitted(model, build(model), *data)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=S))
    assert predictor._graph.each == (name in ("filling", "plate"))
    for rows in (1, 2, 30):
        x = [v[:rows] for v in data[:-1]]
        found, expected = predictor.predict(*x), posterior.predict(*x, draws=S)
        close(found.draws, expected.draws, 2e-6)
        assert found.samples.shape == tuple(expected.samples.shape)


def test_a_branch_on_a_latent_is_named(tmp_path):
    posterior = fitted(branching, AutoNormal(branching), X, Y)
    with pytest.raises(ValueError, match=r"test_predictive_function\.py:\d+ \(branching\) needs the value"):
        posterior.export(tmp_path / "predictor.npz", draws=3)


def test_latents_of_rows_are_drawn_from_the_model(tmp_path):
    posterior = fitted(of_rows, AutoNormal(of_rows), X, Y)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=2000))
    assert set(predictor.latents) == {"slope", "spread"}
    x = X[:4] * 1.5
    found, expected = predictor.predict(x), posterior.predict(x, draws=2000)
    assert (np.abs(found.mean - expected.mean.numpy()) < 5 * expected.draws.std(0).numpy() * np.sqrt(2 / 2000)).all()
    np.testing.assert_allclose(found.epistemic, expected.epistemic, rtol=0.25)


def test_of_several_observed_sites_one_is_named(tmp_path):
    def two(x, y=None, z=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5), obs=y)
            pyro.sample("z", dist.Poisson((slope * x[:, 1]).exp()), obs=z)

    posterior = fitted(two, AutoNormal(two), X, Y, Y.abs().round())
    with pytest.raises(ValueError, match="pass site="):
        posterior.export(tmp_path / "predictor.npz", draws=S)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=S, site="z"))
    close(predictor.predict(X).draws, posterior.predict(X, draws=S, site="z").draws, 1e-6)
    assert (predictor.predict(X).samples == predictor.predict(X).samples.round()).all()


def test_a_likelihood_without_a_mean_gives_its_draws(tmp_path):
    posterior = fitted(heavy, AutoNormal(heavy), X, Y)
    found = load(posterior.export(tmp_path / "predictor.npz", draws=2000)).predict(X[:4])
    expected = posterior.predict(X[:4], draws=2000)
    np.testing.assert_allclose(np.median(found.draws, 0), expected.draws.median(0).values, atol=0.1)
