"""Judgements of an approximation by its importance weights, without a posterior."""

from functools import partial

import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from guides import full_rank_normal
from inference import fit
from inference.predictive.approximation import Approximation
from inference.predictive.importance_weights import (
    corrected_draws,
    diagnose,
    doubts,
    log_weights,
    loo,
    weighted_draws,
    why_no_weights,
)
from ppl_models import linear_regression

MODEL = partial(linear_regression, noise=0.5)


def approximation_of(posterior):
    parts = (posterior.bound_model, posterior.flat_params, posterior.args, posterior.argument_names, posterior.record)
    return Approximation(*parts)


@pytest.fixture(scope="module")
def posterior(line):
    return fit(MODEL, full_rank_normal(MODEL), line.x, line.y, steps=600, lr=0.03, engine="eager", progress=False)


def test_weights_are_those_of_the_draws(posterior):
    approximation = approximation_of(posterior)
    drawn, found = weighted_draws(approximation, 50, 0)
    assert torch.equal(found, log_weights(approximation, 50))
    (x, y), w, b = approximation.data, drawn["weights"], drawn["bias"]
    prior = torch.distributions.Normal(0.0, 1.0)
    mean = w @ x.T + b[:, None]
    joint = prior.log_prob(w).sum(1) + prior.log_prob(b) + torch.distributions.Normal(mean, 0.5).log_prob(y).sum(1)
    torch.testing.assert_close(found, joint - approximation.log_prob(drawn), rtol=1e-4, atol=1e-3)


def test_judgements_are_those_of_the_posterior(posterior):
    approximation = approximation_of(posterior)
    assert diagnose(approximation, draws=200, repeats=2) == posterior.diagnose(draws=200, repeats=2)
    assert doubts(approximation, draws=200) == posterior.doubts(draws=200)
    ours, theirs = loo(approximation, draws=500), posterior.loo(draws=500)
    assert (ours.pointwise == theirs.pointwise).all()
    picked, sampled = corrected_draws(approximation, 100, 3), posterior.sample(100, seed=3, corrected=True)
    assert all(torch.equal(picked[name], sampled[name]) for name in sampled)


def test_a_point_has_no_weights(line):
    point = approximation_of(fit(MODEL, AutoDelta(MODEL), line.x, line.y, steps=20, engine="eager", progress=False))
    assert "point estimate" in why_no_weights(point).reason
    assert not diagnose(point).trusted
    assert doubts(point) == ()
    with pytest.raises(ValueError, match="there are no corrected draws"):
        corrected_draws(point, 10, 0)
