"""Predictions by functions of an approximation: the same numbers as by the methods of a posterior."""

import numpy as np
import pytest
import torch

from guides import mean_field_normal
from inference import Posterior, StoredPrediction, fit
from inference.predictive.approximation import Approximation
from inference.predictive.posterior_predictive import (
    PredictionOptions,
    evaluate,
    log_likelihood,
    predict,
    predict_data,
)
from inference.predictive.streaming import Output, predict_to
from ppl_models import linear_regression

NEW = torch.linspace(-2, 2, 40).reshape(-1, 1)


@pytest.fixture(scope="module")
def posterior(line):
    guide = mean_field_normal(linear_regression)
    return fit(linear_regression, guide, line.x, line.y, steps=100, engine="eager", progress=False)


@pytest.fixture(scope="module")
def approximation(posterior):
    """The same fit, as what functions of this room know of it."""
    parts = (posterior.bound_model, posterior.flat_params, posterior.args, posterior.argument_names, posterior.record)
    found = Approximation(*parts)
    assert not isinstance(found, Posterior)
    return found


def test_an_approximation_predicts_as_a_posterior_does(approximation, posterior):
    options = PredictionOptions(draws=20, seed=3, batch_size=7)
    ours, theirs = predict(approximation, (NEW,), options), posterior.predict(NEW, draws=20, seed=3, batch_size=7)
    assert torch.equal(ours.draws, theirs.draws)
    assert torch.equal(ours.samples, theirs.samples)
    again = predict_data(approximation, options)
    assert torch.equal(again.samples, posterior.predict_data(draws=20, seed=3, batch_size=7).samples)
    assert not torch.equal(predict(approximation, (NEW,), PredictionOptions(draws=20, seed=4)).draws, ours.draws)


def test_an_approximation_is_scored_without_a_posterior(approximation, posterior, line):
    ours, theirs = (evaluate(of, line.x, line.y, draws=30, seed=1).scores for of in (approximation, posterior))
    assert (ours.rmse, ours.log_likelihood, ours.crps) == (theirs.rmse, theirs.log_likelihood, theirs.crps)
    drawn = approximation.sample(30, seed=2)
    likelihood = log_likelihood(approximation, line.x, line.y, draws=drawn, batch_size=9)["y"]
    by_hand = torch.distributions.Normal(
        drawn["weights"] @ line.x.T + drawn["bias"][:, None], drawn["noise"][:, None]
    ).log_prob(line.y)
    torch.testing.assert_close(likelihood, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws": 0}, "draws is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"per_row": 1}, "per_row is 1"),
        ({"progress": "no"}, "progress is 'no'"),
        ({"draws": {"w": NEW}, "per_row": True}, "give draws= as a number"),
    ],
)
def test_options_check_themselves(options, words):
    with pytest.raises(ValueError, match=words):
        PredictionOptions(**options)


def test_options_are_plain_values_that_do_not_change():
    options = PredictionOptions(draws=np.int64(5), seed=np.int32(2), progress=np.bool_(False))
    assert [type(value) for value in (options.draws, options.seed, options.progress)] == [int, int, bool]
    with pytest.raises(AttributeError):
        options.draws = 6


def test_predict_to_writes_what_predict_with_out_writes(approximation, posterior, tmp_path):
    call = {"draws": 25, "seed": 1, "progress": False}
    summary = {"keep": "summary", "quantiles": (0.1, 0.9)}
    by_method = posterior.predict_to(tmp_path / "method.zarr", NEW, **call, **summary)
    assert isinstance(by_method, StoredPrediction)
    by_out = posterior.predict(NEW, **call, **summary, out=tmp_path / "out.zarr")
    output = Output.of(tmp_path / "function.zarr", **summary)
    by_function = predict_to(approximation, (NEW,), PredictionOptions(**call), output)
    for found in (by_out, by_function):
        assert torch.equal(found.mean, by_method.mean)
        assert torch.equal(found.interval(0.8).upper, by_method.interval(0.8).upper)


def test_predict_to_needs_no_other_option_to_resume(posterior, tmp_path):
    first = posterior.predict_to(tmp_path / "pred.zarr", NEW, draws=25, progress=False)
    with pytest.raises(ValueError, match="resume"):
        posterior.predict_to(tmp_path / "pred.zarr", NEW, draws=25, progress=False)
    again = posterior.predict_to(tmp_path / "pred.zarr", NEW, draws=25, progress=False, resume=True)
    assert np.array_equal(again.draws.values, first.draws.values)
