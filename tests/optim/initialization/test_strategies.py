"""fit(..., init=, stop=): where the guide begins, and when the steps end."""

import math
from functools import partial
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta
from torch import nn

from guides import amortized_encoder, full_rank_normal, funnel_flow, mean_field_normal, planar_flow, spline_flow
from inference import fit
from ppl_models import exact_linear_regression, linear_regression
from tests.helpers.schools import SCHOOLS, eight_schools

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 2, generator=GENERATOR, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5 * torch.randn(40, generator=GENERATOR, dtype=torch.float64)
MODEL = partial(linear_regression, noise=0.5)


def begun(guide, model=MODEL, args=(X, Y), **options):
    """A fit that has hardly moved."""
    options = {"steps": 1, "lr": 1e-12, "dtype": torch.float64, "progress": False, **options}
    return fit(model, guide(model), *args, **options)


def positive_scale(x, y=None):
    """A flat prior, and a latent above 0."""
    level = pyro.sample("level", dist.ImproperUniform(constraints.real, (), ()))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(level, spread), obs=y)


def two_modes():
    """N(−4, 1) and N(4, 1) in equal parts."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("modes", torch.logaddexp(-0.5 * (z - 4).square(), -0.5 * (z + 4).square()))


@pytest.mark.parametrize("guide", [mean_field_normal, full_rank_normal, planar_flow, funnel_flow, spline_flow])
def test_values_set_the_location_and_leave_the_spread(guide):
    posterior = begun(guide, positive_scale, init={"spread": 3.0, "level": 7.0})
    draws = posterior.sample(4000)
    assert draws["level"].mean().item() == pytest.approx(7.0, abs=0.2)
    assert draws["spread"].median().item() == pytest.approx(3.0, abs=0.5)
    assert 0.05 < draws["level"].std().item() < 0.3  # the builder's 0.1


def test_sites_left_out_stay_where_the_guide_starts_them():
    posterior = begun(mean_field_normal, positive_scale, init={"level": 2.0})
    assert posterior.params["AutoNormal.locs.level"].item() == pytest.approx(2.0)
    own = begun(mean_field_normal, positive_scale, init="prior")
    assert posterior.params["AutoNormal.locs.spread"].item() == pytest.approx(
        own.params["AutoNormal.locs.spread"].item(), abs=1e-9
    )


def test_the_users_guide_is_not_moved():
    guide = mean_field_normal(MODEL)
    guide(X, Y)
    before = guide.locs.weights.detach().clone()
    fit(MODEL, guide, X, Y, steps=1, init={"weights": [5.0, 5.0]}, progress=False, dtype=torch.float64)
    assert torch.equal(guide.locs.weights.detach(), before)


@pytest.mark.parametrize("mode", [-4.0, pytest.param(4.0, marks=pytest.mark.slow)])
def test_found_steps_begin_at_the_values_and_end_in_their_mode(mode):
    posterior = fit(
        two_modes, full_rank_normal(two_modes), init={"z": mode + 0.3}, optimizer="auto", steps=2000, progress=False
    )
    draws = posterior.sample(4000)["z"]
    assert draws.mean().item() == pytest.approx(mode, abs=0.1)
    assert draws.std().item() == pytest.approx(1.0, abs=0.1)
    assert posterior.record.options["init"] == ["z"]


def test_the_mode_with_the_curvature_before_any_step():
    exact = exact_linear_regression(X, Y, noise=0.5)
    posterior = begun(full_rank_normal, init="mode")
    scale, unit = (posterior.params[f"AutoMultivariateNormal.{name}"] for name in ("scale", "scale_tril"))
    tril = scale[:, None] * unit
    torch.testing.assert_close(posterior.params["AutoMultivariateNormal.loc"], exact.mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tril @ tril.T, exact.covariance, rtol=1e-5, atol=1e-8)
    assert posterior.record.evaluations > 1
    elsewhere = begun(full_rank_normal, init="prior").params["AutoMultivariateNormal.loc"]
    assert (elsewhere - exact.mean).abs().max() > 0.5
    torch.testing.assert_close(begun(full_rank_normal).params["AutoMultivariateNormal.loc"], elsewhere)


def test_a_point_begins_at_the_mode():
    exact = exact_linear_regression(X, Y, noise=0.5)
    posterior = begun(AutoDelta, init="mode")
    torch.testing.assert_close(posterior.params["AutoDelta.weights"], exact.mean[:2], rtol=1e-5, atol=1e-7)


def test_where_there_is_no_mode_it_is_said():
    sigma, effects = (value.double() for value in SCHOOLS)
    with pytest.raises(ValueError, match=r"ended at no mode .* pass init='auto'"):
        begun(full_rank_normal, eight_schools, (sigma, effects), init="mode")


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("median", "init is 'median': pass 'auto', 'mode', 'prior' or"),
        (3.0, "init is 3.0"),
        ({"slope": 1.0}, "init names 'slope', which is no latent site: name some of"),
        ({"spread": -1.0}, "init of 'spread' is -1.0, outside of its support"),
        ({"level": math.nan}, "init of 'level' is nan, outside"),
        ({"level": [1.0, 2.0]}, r"init of 'level' is \[1.0, 2.0\]: give numbers of shape \(\)"),
        ({"level": "high"}, "init of 'level' is 'high': give numbers of shape"),
    ],
)
def test_what_is_no_start_is_refused_by_name(init, words):
    with pytest.raises(ValueError, match=words):
        begun(mean_field_normal, positive_scale, init=init)


def test_guides_without_a_location_of_their_own_say_so():
    def by_hand(x, y=None):
        loc = pyro.param("loc", torch.zeros(2, dtype=torch.float64))
        pyro.sample("weights", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("bias", dist.Normal(0.0, 1.0))

    def rows(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match=r"init=\{site: value\} needs one of Pyro's autoguides, but by_hand is none"):
        begun(lambda model: by_hand, init={"weights": [0.0, 0.0]})
    with pytest.raises(ValueError, match="needs one of Pyro's autoguides"):
        begun(partial(amortized_encoder, encoder=nn.Linear(2, 2).double()), rows, (X,), init={"z": 0.0})
    with pytest.raises(ValueError, match="init='mode' cannot be done: by_hand is no guide over a fixed vector"):
        begun(lambda model: by_hand, init="mode")


def test_why_a_fit_began_where_its_guide_does_is_said():
    def by_hand(x, y=None):
        pyro.sample("weights", dist.Normal(pyro.param("loc", torch.zeros(2, dtype=torch.float64)), 1.0).to_event(1))
        pyro.sample("bias", dist.Normal(0.0, 1.0))

    options = {"optimizer": "auto", "steps": 20, "dtype": torch.float64, "progress": False}
    posterior = fit(MODEL, by_hand, X, Y, **options)
    reason = "; it began where the guide does: by_hand is no guide over a fixed vector of latents"
    assert posterior.stop_reason.endswith(reason)
    assert "it began" not in fit(MODEL, full_rank_normal(MODEL), X, Y, **options).stop_reason
    assert "it began" not in fit(MODEL, by_hand, X, Y, batch_size=10, **options).stop_reason


@pytest.mark.slow
def test_all_steps_are_taken_where_that_is_asked():
    """Where an end would have been found after 2,000, as a test of landing has it."""
    options = {"optimizer": "auto", "steps": 2500, "dtype": torch.float64, "progress": False}
    whole = fit(MODEL, full_rank_normal(MODEL), X, Y, stop="steps", **options)
    assert len(whole.losses) == 2500
    assert not whole.record.stop.converged
    assert whole.stop_reason == "all 2,500 steps were taken, as was asked"


def test_an_end_that_cannot_be_found_is_refused():
    with pytest.raises(ValueError, match="stop is 'early': pass 'auto', 'converged' or 'steps'"):
        begun(mean_field_normal, stop="early")
    with pytest.raises(ValueError, match="stop='converged' goes with steps that are found"):
        begun(mean_field_normal, stop="converged")


@pytest.mark.parametrize(
    "error", [RuntimeError("singular"), ValueError("support"), ZeroDivisionError("scale"), TypeError("dtype")]
)
def test_a_numerical_error_ends_the_search_with_its_reason(error, monkeypatch):
    monkeypatch.setattr("inference.optim.initialization.strategies.ascend", mock.Mock(side_effect=error))
    posterior = begun(mean_field_normal, steps=20, lr=None, optimizer="auto")
    assert f"the search of the mode failed: {type(error).__name__}: {error}" in posterior.stop_reason


@pytest.mark.parametrize("error", [KeyError("weights"), IndexError("path"), AttributeError("loc")])
def test_any_other_error_in_the_search_is_raised(error, monkeypatch):
    monkeypatch.setattr("inference.optim.initialization.strategies.ascend", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        begun(mean_field_normal, steps=20, lr=None, optimizer="auto")
