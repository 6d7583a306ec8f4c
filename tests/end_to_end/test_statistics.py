"""Fits against posteriors that are known in closed form."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import full_rank_normal, funnel_flow, low_rank_normal, mean_field_normal, planar_flow, spline_flow
from inference import cosine_decay, fit
from ppl_models import exact_linear_regression, linear_regression

NOISE, PRIOR, ROWS, COLUMNS, DRAWS = 0.5, 1.0, 60, 4, 10_000
MODEL = partial(linear_regression, noise=NOISE, prior_scale=PRIOR, intercept=False)


@pytest.fixture(scope="module")
def orthonormal():
    rng = np.random.default_rng(7)
    x = np.linalg.qr(rng.normal(size=(ROWS, COLUMNS)))[0]
    y = x @ np.array([2.0, -1.0, 0.5, 0.0]) + rng.normal(0, NOISE, ROWS)
    # XᵀX = I makes the posterior of the weights independent, so mean-field is exact.
    variance = 1 / (1 / NOISE**2 + 1 / PRIOR**2)
    return x, y, variance * (x.T @ y) / NOISE**2, np.full(COLUMNS, variance**0.5)


def decaying(step):
    """1/t steps: the error of θ then falls as 1/√(steps · particles), about 0.01 sd here."""
    return 1 / (20 + step)


OPTIONS = {"particles": 2, "progress": False}


def agrees(posterior, mean, sd):
    """Means within 5 Monte-Carlo errors, sds within 3 %, which is 4.2 standard errors of an sd from 10,000 draws."""
    weights = posterior.sample(DRAWS, seed=1)["weights"].double().numpy()
    close = np.abs(weights.mean(0) - mean) < 5 * sd / DRAWS**0.5
    right = np.abs(weights.std(0) / sd - 1) < 0.03
    return bool(close.all() and right.all())


@pytest.mark.parametrize(
    ("seed", "engine"), [*((seed, "compiled") for seed in range(5)), pytest.param(0, "eager", marks=pytest.mark.slow)]
)
def test_mean_field_is_exact_where_the_posterior_is_independent(orthonormal, seed, engine):
    x, y, mean, sd = orthonormal
    guide = mean_field_normal(MODEL)
    posterior = fit(MODEL, guide, x, y, steps=5000, lr=decaying, seed=seed, engine=engine, **OPTIONS)
    assert agrees(posterior, mean, sd)


def test_a_guide_of_half_the_width_fails_the_same_check(orthonormal):
    x, y, mean, sd = orthonormal

    def too_narrow(x, y=None):
        loc = pyro.param("loc", torch.zeros(COLUMNS))
        pyro.sample("weights", dist.Normal(loc, torch.tensor(sd / 2, dtype=loc.dtype)).to_event(1))

    posterior = fit(MODEL, too_narrow, x, y, steps=5000, lr=decaying, engine="compiled", **OPTIONS)
    assert not agrees(posterior, mean, sd)
    narrow = posterior.sample(DRAWS, seed=1)["weights"].double().numpy().std(0)
    np.testing.assert_allclose(narrow, sd / 2, rtol=0.03)


def test_the_elbo_reaches_the_log_evidence_where_the_guide_is_exact(orthonormal):
    x, y, _, _ = orthonormal
    posterior = fit(MODEL, mean_field_normal(MODEL), x, y, steps=5000, lr=decaying, engine="compiled", **OPTIONS)
    covariance = NOISE**2 * np.eye(ROWS) + PRIOR**2 * x @ x.T
    evidence = float(
        dist.MultivariateNormal(torch.zeros(ROWS).double(), torch.tensor(covariance)).log_prob(torch.tensor(y))
    )
    weights = posterior.log_weights(2000).double()
    # With an exact guide every log weight is the log evidence; what is left is the fit's own error.
    assert abs(float(weights.mean()) - evidence) < 0.02
    assert float(weights.std()) < 0.2


@pytest.fixture(scope="module")
def parabola():
    """Slope, curvature and intercept, strongly correlated, and the closed form."""
    t = np.linspace(0, 1, ROWS)
    x = np.stack([t, t**2], 1)
    y = 1 + 2 * t - t**2 + np.random.default_rng(7).normal(0, NOISE, ROWS)
    return x, y, exact_linear_regression(x, y, noise=NOISE)


PARABOLA = partial(linear_regression, noise=NOISE)


def errors_on(parabola, build, seed, steps=20_000, lr=0.01):
    """Worst mean in Monte-Carlo errors of 10,000 draws, worst covariance entry, log evidence − ELBO in nats."""
    x, y, exact = parabola
    schedule = cosine_decay(lr, steps)
    options = {"particles": 8, "engine": "compiled", "progress": False}
    posterior = fit(PARABOLA, build(PARABOLA), x, y, steps=steps, lr=schedule, seed=seed, **options)
    mean, _ = moments(posterior, 10_000)
    error = (mean - exact.mean).abs() / (exact.covariance.diagonal() / 10_000).sqrt()
    off = (moments(posterior, 200_000)[1] / exact.covariance - 1).abs()
    return float(error.max()), float(off.max()), exact.log_evidence - float(posterior.log_weights(2000).mean())


def moments(posterior, draws):
    found = posterior.sample(draws, seed=1)
    z = torch.cat([found["weights"], found["bias"][:, None]], 1).double()
    return z.mean(0), torch.cov(z.T)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))])
def test_full_rank_is_exact_on_linear_regression(parabola, seed):
    """At 200,000 draws the covariance entries have a Monte-Carlo error of at most 0.7 %."""
    mean, covariance, gap = errors_on(parabola, full_rank_normal, seed)
    assert mean < 5
    assert covariance < 0.05
    assert abs(gap) < 0.05


def test_mean_field_fails_the_same_check(parabola):
    _, covariance, gap = errors_on(parabola, mean_field_normal, 0)
    assert covariance > 0.5
    assert gap > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("build", [planar_flow, funnel_flow, spline_flow, low_rank_normal])
def test_the_other_guides_with_correlations_come_close(parabola, build):
    _, covariance, gap = errors_on(parabola, build, 0)
    assert covariance < 0.15
    assert abs(gap) < 0.05
