"""The fitted approximation alone: its draws, its checks of arguments, and the context in which it runs."""

import math

import pytest
import torch

from guides import mean_field_normal
from inference import Posterior, fit
from inference.predictive.approximation import Approximation
from ppl_models import linear_regression


@pytest.fixture(scope="module")
def approximation(line):
    guide = mean_field_normal(linear_regression)
    found = fit(linear_regression, guide, line.x, line.y, steps=50, engine="eager", batch_size=10, progress=False)
    return Approximation(found.bound_model, found.flat_params, found.args, found.argument_names, found.record)


def test_a_posterior_is_an_approximation_and_nothing_else():
    assert Posterior.__mro__ == (Posterior, Approximation, object)


def test_draws_depend_on_the_seed_alone(approximation):
    before = torch.random.get_rng_state()
    first, again, other = (approximation.sample(20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["bias"], other["bias"])
    density = approximation.log_prob(first)
    assert density.shape == (20,)
    assert torch.isfinite(density).all()


def test_branches_of_a_seed_have_other_random_numbers(approximation):
    with approximation.running(0):
        first = torch.randn(5)
    with approximation.running(0, 1):
        assert not torch.equal(torch.randn(5), first)
    with approximation.running(0):
        assert torch.equal(torch.randn(5), first)
        assert not torch.is_grad_enabled()


def test_arguments_are_checked_against_the_fit(approximation, line):
    checked = approximation.check_arguments((line.x[:3],))
    assert torch.equal(checked[0], line.x[:3])
    assert checked[1] is None
    with pytest.raises(ValueError, match="x"):
        approximation.check_arguments((torch.zeros(3, 7),))
    with pytest.raises(ValueError, match=r"x\[40:43\]"):
        approximation.check_arguments((torch.full((3, 1), math.nan),), slice(40, 43))


def test_what_is_left_out_is_that_of_the_fit(approximation):
    assert approximation.resolve_site(None) == "y"
    assert approximation.resolve_batch_size(None) == 10
    assert approximation.resolve_batch_size(4) == 4
    with pytest.raises(ValueError, match="site is 'other'"):
        approximation.resolve_site("other")
    with pytest.raises(ValueError, match="batch_size is 0"):
        approximation.resolve_batch_size(0)


def test_without_data_questions_to_the_data_are_refused(approximation):
    parts = (approximation.bound_model, approximation.flat_params, approximation.args, approximation.argument_names)
    loaded = Approximation(*parts, approximation.record, has_data=False)
    assert loaded.sample(2)["bias"].shape == (2,)
    with pytest.raises(ValueError, match="without its data"):
        loaded.inputs()
