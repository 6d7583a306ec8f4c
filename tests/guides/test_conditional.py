from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from guides import conditional_normal, low_rank_normal, mean_field_normal
from inference import cosine_decay, fit, load
from inference.model.vectorization import together
from ppl_models import bnn_regression, linear_regression
from ppl_models.data.datasets import cosine

ROWS = torch.linspace(-1, 1, 30)
X = torch.stack([ROWS, ROWS**2], 1)
Y = 2 * X[:, 0] - X[:, 1] + 1 + 0.3 * torch.sin(50 * ROWS)
LINEAR = ["weights", "bias"]
TRUTH = np.cos(np.pi * np.linspace(-1, 1, 200))
NETWORK = partial(bnn_regression, noise="learned")


@pytest.fixture(scope="module")
def posterior():
    return fit(linear_regression, conditional_normal(linear_regression, LINEAR), X, Y, steps=30, progress=False)


def exact(noise):
    """The posterior of weights and bias, in that order, for N(0, 1) priors and a known noise."""
    prior = poutine.trace(linear_regression).get_trace(X, Y).nodes
    scales = torch.cat([prior[name]["fn"].stddev.reshape(-1) for name in LINEAR])
    design = torch.cat([X, torch.ones(len(X), 1)], 1)
    precision = (design.T @ design / noise**2 + (1 / scales**2).diag()).double()
    return dist.MultivariateNormal(
        torch.linalg.solve(precision, (design.T @ Y / noise**2).double()), precision_matrix=precision
    )


def density(guide, values):
    nodes = poutine.trace(poutine.condition(guide, data=values)).get_trace(X, Y)
    nodes.compute_log_prob()
    return sum(nodes.nodes[name]["log_prob_sum"] for name in LINEAR)


@pytest.mark.parametrize("noise", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("linear", [LINEAR, LINEAR[::-1]])
def test_with_all_rows_the_sites_have_their_exact_posterior_given_the_rest(noise, linear):
    guide, whole = conditional_normal(linear_regression, linear), exact(noise)
    point = whole.sample().float()
    values = {"weights": point[:2], "bias": point[2:], "noise": torch.tensor(noise)}
    shaped = poutine.trace(linear_regression).get_trace(X, Y).nodes
    values = {name: value.reshape(shaped[name]["value"].shape) for name, value in values.items()}
    with pyro.get_param_store().scope():
        assert density(guide, values).item() == pytest.approx(whole.log_prob(point.double()).item(), abs=2e-3)
        pyro.param("rows.shift").data.fill_(1.0)
        assert density(guide, values).item() != pytest.approx(whole.log_prob(point.double()).item(), abs=0.1)


def test_draws_are_from_the_density():
    """Mean and covariance of 4,000 draws in units in which they are N(0, I), at five standard errors."""
    count, whole = 4000, exact(0.3)
    guide, noise = conditional_normal(linear_regression, LINEAR), {"noise": torch.full((count,), 0.3)}
    with pyro.get_param_store().scope(), torch.no_grad():
        pyro.set_rng_seed(0)
        guide(X, Y)
        (drawn,) = together(lambda z: poutine.condition(guide, data=z)(X, Y), noise, count, count)
    points = torch.cat([drawn[name].reshape(count, -1) for name in LINEAR], 1).double()
    units = torch.linalg.solve_triangular(whole.scale_tril, (points - whole.loc).T, upper=False)
    assert units.mean(1).abs().max() < 5 / count**0.5
    assert (torch.cov(units) - torch.eye(3)).abs().max() < 5 * (2 / count) ** 0.5


def test_a_saved_posterior_needs_no_data(posterior, tmp_path):
    again = load(posterior.save(tmp_path / "fit"), linear_regression, conditional_normal(linear_regression, LINEAR))
    torch.testing.assert_close(again.predict(X[:7], draws=20).draws, posterior.predict(X[:7], draws=20).draws)


def test_the_kept_rows_stay_and_the_rest_is_learned(posterior):
    kept = posterior.params
    torch.testing.assert_close(kept["rows.0"], X)
    torch.testing.assert_close(kept["rows.1"], Y)
    assert kept["rows.shift"].abs().max() > 0


def test_fewer_points_than_rows_and_another_guide_for_the_rest():
    guide = conditional_normal(linear_regression, LINEAR, others=partial(low_rank_normal, rank=1), points=10)
    posterior = fit(linear_regression, guide, X, Y, steps=100, lr=0.05, progress=False)
    assert posterior.params["rows.0"].shape == (10, 2)
    assert posterior.predict(X, draws=200).mean.sub(Y).square().mean().sqrt() < 0.3


def counts(x, y=None):
    rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Poisson(rate.exp().expand(len(x))), obs=y)


def grouped(groups, y=None):
    levels = pyro.sample("levels", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(groups)):
        return pyro.sample("y", dist.Normal(levels[groups[:, 0]], 0.1), obs=y)


def with_row_latents(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(slope * x[:, 0] + z, 0.1), obs=y)


@pytest.mark.parametrize(
    ("model", "linear", "x", "message"),
    [
        (linear_regression, ["slope"], X, "linear names 'slope', which is no latent site"),
        (linear_regression, ["noise"], X, "site 'noise' is HalfNormal"),
        (partial(bnn_regression, hidden=[3]), ["w0"], X, "not affine in \\['w0'\\] together"),
        (partial(bnn_regression, hidden=[3]), ["w0", "w1"], X, "not affine in"),
        (counts, ["rate"], X, "site 'y' is Poisson"),
        (with_row_latents, ["slope"], X, "each row has the latents \\['z'\\]"),
        (grouped, ["levels"], X.round().abs().int(), "argument 1 of the model is torch.int32"),
    ],
)
def test_what_the_guide_cannot_do_is_named(model, linear, x, message):
    with pytest.raises(ValueError, match=message):
        fit(model, conditional_normal(model, linear), x, Y.round().abs(), steps=1, progress=False)


@pytest.mark.parametrize(
    ("options", "message"), [({"linear": "w2"}, "linear is 'w2'"), ({"linear": ["w2"], "points": 0}, "points is 0")]
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        conditional_normal(linear_regression, **options)


def learned(build, seed, steps, lr=0.01, **options):
    """RMSE to the true curve, and the mean of the noise, of a fit to 40 rows of a cosine with noise 0.05."""
    data, model = cosine(), partial(NETWORK, **options)
    posterior = fit(
        model, build(model), data.x, data.y, steps=steps, lr=cosine_decay(lr, steps), seed=seed, progress=False
    )
    mean = np.asarray(posterior.predict(np.linspace(-1, 1, 200)[:, None], draws=500).mean)
    return np.sqrt(np.mean((mean - TRUTH) ** 2)), float(posterior.sample(500)["noise"].mean())


def test_learned_noise_of_a_small_network_does_not_collapse():
    rmse, noise = learned(partial(conditional_normal, linear=["w1", "b1"]), 0, 200, lr=0.03, hidden=[8])
    assert rmse < 0.15
    assert noise < 0.2
    rmse, noise = learned(mean_field_normal, 0, 200, lr=0.03, hidden=[8])
    assert rmse > 0.3
    assert noise > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_learned_noise_of_edwards_network(seed):
    rmse, noise = learned(partial(conditional_normal, linear=["w2", "b2"]), seed, 10_000)
    assert rmse < 0.04
    assert 0.025 < noise < 0.065
    rmse, noise = learned(mean_field_normal, seed, 10_000)
    assert rmse > 0.5
    assert noise > 0.5
