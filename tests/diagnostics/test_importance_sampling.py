"""Importance weights: what they say of a guide, and draws that they correct."""

import math
import re
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from guides import full_rank_normal, mean_field_normal
from inference import fit
from inference.diagnostics.checks import diagnose
from inference.diagnostics.importance_sampling import moments, smoothed_weights
from ppl_models import exact_linear_regression, linear_regression

DRAWS = 4000
FLAT = np.random.default_rng(0).normal(100, 3, 4000)
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 1, generator=GENERATOR, dtype=torch.float64) + 0.5  # not centred: slope and intercept correlated
Y = 2 * X[:, 0] + 0.5 * torch.randn(40, generator=GENERATOR, dtype=torch.float64)
MODEL = partial(linear_regression, noise=0.5)


def drawn(loc, scale, seed=0, size=2):
    """Draws of q = N(loc, scale²) on the first number, N(0, 1) on the others, and log p/q for p = N(0, I)."""
    z = np.random.default_rng(seed).normal(size=(DRAWS, size))
    noise = z[:, 0].copy()
    z[:, 0] = loc + scale * noise
    return {f"z[{i}]": z[:, i] for i in range(size)}, 0.5 * noise**2 + math.log(scale) - 0.5 * z[:, 0] ** 2


def test_weights_correct_a_shifted_and_wide_normal():
    values, log_weights = drawn(0.3, 1.2)
    weights = smoothed_weights(log_weights)
    mean, sd = weights.moments(np.stack(list(values.values()), 1))
    error = 3 / math.sqrt(weights.ess)
    assert abs(mean).max() < error
    assert abs(sd - 1).max() < error
    assert abs(values["z[0]"].mean()) > 0.25  # the draws themselves are off
    assert weights.ess < DRAWS


def test_equal_weights_are_worth_all_draws_and_shift_nothing():
    values, _ = drawn(0.0, 1.0)
    weights = smoothed_weights(np.zeros(DRAWS))
    assert weights.ess == pytest.approx(DRAWS)
    found = moments(values, weights).worst()
    assert found.mean == pytest.approx(0, abs=1e-12)
    assert found.mean_se == pytest.approx(0, abs=1e-12)
    assert found.ratio == pytest.approx(1)


@pytest.mark.parametrize(
    ("loc", "scale", "trusted", "words"),
    [
        (0.0, 1.0, True, None),
        (0.03, 1.02, True, None),
        (0.3, 1.1, False, r"the mean of z\[0\] is off by 0\.\d+ ± 0\.\d+ posterior sds"),
        (0.0, 1.25, False, r"the standard deviation of z\[0\] is 1\.\d+ ± 0\.\d+ of the posterior's"),
        (0.0, 0.85, False, r"the standard deviation of z\[0\] is 0\.\d+ ± 0\.\d+ of the posterior's"),
        (0.0, 0.3, False, r"Pareto k-hat is 0\.\d+, above 0\.\d+"),
    ],
)
def test_a_guide_is_trusted_where_its_moments_are_the_posteriors(loc, scale, trusted, words):
    values, log_weights = drawn(loc, scale)
    found = diagnose(log_weights.reshape(4, -1), FLAT, values)
    assert found.trusted == trusted, found.reasons
    if words is not None:
        assert any(re.search(words, reason) for reason in found.reasons), found.reasons
        assert found.advice


def test_a_guide_whose_moments_are_off_is_hardly_ever_trusted():
    """Off by exactly the limit: two standard errors keep trust below 5 %, of 100 sets of draws."""
    trusted = 0
    for seed in range(100):
        values, log_weights = drawn(0.1, 1.0, seed)
        trusted += diagnose(log_weights.reshape(4, -1), FLAT, values).trusted
    assert trusted <= 10  # of 100 with 2.3 % each; 10 lies 5 sd above


def test_resampled_draws_come_as_often_as_their_weights_say():
    weights = smoothed_weights(np.log(np.repeat([1.0, 3.0], 500)))
    counts = np.bincount(weights.resampled(8000, np.random.default_rng(0)), minlength=1000)
    expected = 8000 * np.exp(weights.log)
    assert abs(counts - expected).max() <= 1
    assert counts.sum() == 8000


def test_corrected_draws_are_nearer_to_the_posterior_than_the_guides():
    """A mean-field Normal's sds are too small where latents are correlated; weights make up for it."""
    posterior = fit(
        MODEL, mean_field_normal(MODEL), X, Y, steps=3000, engine="compiled", dtype=torch.float64, progress=False
    )
    exact = exact_linear_regression(X, Y, noise=0.5)
    sd = exact.covariance.diagonal().sqrt()

    def error(**options):
        draws = posterior.sample(20_000, **options)
        found = torch.cat([draws["weights"], draws["bias"][:, None]], 1)
        return float((found.std(0) / sd - 1).abs().max()), found

    plain, _ = error()
    corrected, draws = error(corrected=True)
    assert plain > 0.05
    assert corrected < plain / 2
    correlation = float(torch.corrcoef(draws.T)[0, 1])
    wanted = float(exact.covariance[0, 1] / sd[0] / sd[1])
    assert correlation == pytest.approx(wanted, abs=0.05)


def test_corrected_draws_are_the_seeds_and_refused_where_weights_correct_nothing():
    posterior = fit(MODEL, full_rank_normal(MODEL), X, Y, steps=300, lr=0.02, dtype=torch.float64, progress=False)
    one, two, other = (posterior.sample(50, seed=seed, corrected=True)["bias"] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.shape == (50,)
    started = fit(MODEL, mean_field_normal(MODEL), X, Y, steps=1, dtype=torch.float64, progress=False)
    with pytest.raises(ValueError, match="weights correct nothing"):
        started.sample(10, corrected=True)
    point = fit(MODEL, AutoDelta(MODEL), X, Y, steps=1, dtype=torch.float64, progress=False)
    with pytest.raises(ValueError, match="no corrected draws, as the guide is a point estimate"):
        point.sample(10, corrected=True)


def test_a_model_that_runs_draw_by_draw_has_the_same_checks():
    def branching(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        if slope.item() > 1e6:  # which torch.vmap cannot follow
            slope = slope * 0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5), obs=y)

    posterior = fit(branching, full_rank_normal(branching), X, Y, steps=800, lr=0.05, engine="eager", progress=False)
    found = posterior.diagnose(draws=400, repeats=2)
    assert found.shift is not None
    assert found.shift.mean_at == "slope"
    assert found.ess > 100


@pytest.mark.parametrize(("guide", "converged"), [(full_rank_normal, True), (mean_field_normal, False)])
def test_a_fit_says_converged_only_of_the_posterior_itself(guide, converged):
    """Both come to rest; the independent Normals at sds that are too small."""
    x = X + 2  # more correlated
    posterior = fit(MODEL, guide(MODEL), x, Y, steps=6000, engine="compiled", dtype=torch.float64, progress=False)
    stop = posterior.record.stop
    assert stop.settled
    assert stop.converged == converged
    assert posterior.stop_reason.startswith("converged after" if converged else "settled after")
    if not converged:
        assert "but the guide is not the posterior: " in posterior.stop_reason
