"""The energies are those of the paper, normalised; linear regression's closed form is the model's own posterior."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from ppl_models import Energy, Scaling, exact_linear_regression, linear_regression, u1, u2, u3, u4

NAMES = ["u1", "u2", "u3", "u4"]


def as_published(name, a, b):
    """Table 1 of Rezende, Mohamed (2015) at one point, by the letter."""
    sine = math.sin(2 * math.pi * a / 4)
    bump = 3 * math.exp(-0.5 * ((a - 1) / 0.6) ** 2)
    rise = 3 / (1 + math.exp(-(a - 1) / 0.3))
    if name == "u1":
        ring = 0.5 * ((math.hypot(a, b) - 2) / 0.4) ** 2
        return ring - math.log(math.exp(-0.5 * ((a - 2) / 0.6) ** 2) + math.exp(-0.5 * ((a + 2) / 0.6) ** 2))
    if name == "u2":
        return 0.5 * ((b - sine) / 0.4) ** 2
    first = math.exp(-0.5 * ((b - sine) / (0.35 if name == "u3" else 0.4)) ** 2)
    return -math.log(first + math.exp(-0.5 * ((b - sine + (bump if name == "u3" else rise)) / 0.35) ** 2))


@pytest.mark.parametrize("name", NAMES)
def test_inside_the_window_the_energy_is_the_published_one(name):
    energy = Energy(name)
    points = [(-3.9, 0.4), (-1.0, -1.2), (0.0, 0.1), (1.0, 1.1), (1.3, -1.9), (4.0, 0.5)]
    found = energy.log_prob(torch.tensor(points, dtype=torch.float64))
    expected = [-as_published(name, a, b) - energy.log_normalizer for a, b in points]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_density_integrates_to_one_on_another_grid(name):
    edge = torch.linspace(-7.7, 7.7, 1101, dtype=torch.float64)
    whole = Energy(name).log_prob(torch.cartesian_prod(edge, edge)).exp().sum() * (edge[1] - edge[0]) ** 2
    assert abs(float(whole) - 1) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_draws_have_the_moments_of_the_density(name):
    """20,000 draws: the mean of z and of log p within 5 standard errors of quadrature's."""
    edge = torch.linspace(-8, 8, 801, dtype=torch.float64)
    points = torch.cartesian_prod(edge, edge)
    log_p = Energy(name).log_prob(points)
    weight = log_p.exp() * (edge[1] - edge[0]) ** 2
    torch.manual_seed(0)
    draws = Energy(name).sample((20_000,)).double()
    for drawn, exact in (
        (draws[:, 0], points[:, 0]),
        (draws[:, 1], points[:, 1]),
        (Energy(name).log_prob(draws), log_p),
    ):
        assert abs(drawn.mean() - (weight * exact).sum()) < 5 * drawn.std() / 20_000**0.5


def test_u1_has_the_known_normaliser_and_two_modes():
    assert Energy("u1").log_normalizer == pytest.approx(1.877502, abs=1e-6)
    left, right, centre = Energy("u1").log_prob(torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]))
    assert left == right > centre + 1


def test_the_wall_is_the_stated_one():
    inside, outside = Energy("u2").log_prob(torch.tensor([[4.0, 0.0], [4.8, math.sin(2.4 * math.pi)]]))
    assert float(inside - outside) == pytest.approx(0.5 * (0.8 / 0.4) ** 2, rel=1e-5)


@pytest.mark.parametrize("model", [u1, u2, u3, u4])
def test_each_is_a_pyro_model_with_one_site(model):
    trace = poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (2,)
    assert torch.isfinite(trace.log_prob_sum())


def test_an_energy_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"there is no energy 'u5': give one of \['u1', 'u2', 'u3', 'u4'\]"):
        Energy("u5")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_the_closed_form_is_bayes_rule_for_the_model(scaled, intercept):
    """log p(y) = log p(y, β) − log p(β | y) for any β, with p(y, β) from the Pyro model."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(30, 2))
    y = 5 + x @ np.array([1.0, -2.0]) + rng.normal(0, 0.7, 30)
    options = {
        "noise": 0.7,
        "prior_scale": 2.0,
        "intercept": intercept,
        "scaling": Scaling.of(x, y) if scaled else None,
    }
    exact = exact_linear_regression(x, y, **options)
    posterior = torch.distributions.MultivariateNormal(exact.mean, exact.covariance)
    model = partial(linear_regression, **options)
    torch.manual_seed(0)
    for beta in posterior.sample((3,)):
        values = {"weights": beta[:2], **({"bias": beta[2]} if intercept else {})}
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(torch.tensor(x), torch.tensor(y))
        assert float(trace.log_prob_sum() - posterior.log_prob(beta)) == pytest.approx(exact.log_evidence, abs=1e-8)


def test_the_closed_form_needs_a_known_noise():
    with pytest.raises(ValueError, match="noise is 'learned': the closed form needs a number above 0"):
        exact_linear_regression([[1.0]], [1.0], noise="learned")


def test_energies_leave_pyros_store_alone():
    pyro.clear_param_store()
    u1()
    assert not list(pyro.get_param_store().keys())
