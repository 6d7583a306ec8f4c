"""The compiled engine in a fit: what it runs, records again, and leaves alone."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import mean_field_normal
from inference import fit
from inference.engine.compiled import CompiledEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.utils.random_state import RandomStream
from ppl_models import linear_regression
from tests.helpers.small_models import COMPILED, CPU, X, Y, check, closure


def test_the_same_seed_gives_the_same_numbers_and_another_others():
    first, again, other = (
        fit(linear_regression, mean_field_normal(linear_regression), X, Y, steps=300, **{**COMPILED, "seed": seed})
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first.losses, again.losses)
    assert not np.array_equal(first.losses, other.losses)
    assert first.record.options["engine"] == "compiled"


@pytest.mark.slow
def test_the_fit_lands_where_eager_lands():
    ours = fit(linear_regression, mean_field_normal(linear_regression), X, Y, steps=4000, **COMPILED)
    theirs = fit(
        linear_regression, mean_field_normal(linear_regression), X, Y, steps=4000, engine="eager", progress=False
    )
    error = np.std(theirs.losses[-1000:]) / np.sqrt(1000)
    assert abs(ours.losses[-1000:].mean() - theirs.losses[-1000:].mean()) < 5 * np.sqrt(2) * error + 0.05


def counting():
    calls = itertools.count()

    def model(x, y=None):
        next(calls)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(w * x[:, 0].mean(), 1.0), obs=y)

    return model, calls


def test_the_models_python_does_not_run_in_the_steps():
    counts = []
    for steps in (10, 900):
        model, calls = counting()
        fit(model, mean_field_normal(model), X, Y, steps=steps, **COMPILED)
        counts.append(next(calls))
    assert counts[0] == counts[1]


def test_one_run_is_recorded():
    model, calls = counting()
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(model, mean_field_normal(model), (X, Y), stream, CPU, torch.float32)
    before = next(calls)
    CompiledEngine(SVIProblem.on(bound_model, InMemory((X, Y))), stream).init(stream)
    assert next(calls) - before - 1 == 1


def test_a_model_that_only_counts_its_calls_is_no_trouble():
    calls = []

    def model(y):
        calls.append(1)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    posterior = fit(model, mean_field_normal(model), torch.tensor(1.0), steps=500, **COMPILED)
    assert posterior.record.options["engine"] == "compiled"
    assert len(calls) < 10


def test_another_shape_is_recorded_again_and_right(interpreted):
    """A mean over 40 rows must not be divided by 40 for 20 rows."""
    model, _ = counting()
    for rows in (40, 20):
        check(model, mean_field_normal(model), (X[:rows] + 1, Y[:rows]))


def test_other_data_of_the_same_shape_are_not_the_old_ones():
    first, second = (
        fit(linear_regression, mean_field_normal(linear_regression), X, y, steps=2000, lr=0.02, **COMPILED)
        for y in (Y, Y + 5)
    )
    assert second.params["AutoNormal.locs.bias"] - first.params["AutoNormal.locs.bias"] > 4


def test_a_changed_closure_is_not_frozen_between_fits():
    model, settings, offset = closure(1)
    one = torch.tensor(0.0)
    options = {"steps": 1500, "lr": 0.02, **COMPILED}
    assert abs(float(fit(model, mean_field_normal(model), one, **options).params["AutoNormal.locs.w"]) + 1) < 0.1
    settings["shift"] = 2.0
    assert abs(float(fit(model, mean_field_normal(model), one, **options).params["AutoNormal.locs.w"]) + 2) < 0.1
    offset.fill_(0.5)
    assert abs(float(fit(model, mean_field_normal(model), one, **options).params["AutoNormal.locs.w"]) + 1) < 0.1


@pytest.mark.parametrize("how", ["number", "tensor"])
def test_a_callback_that_changes_what_the_model_reads_is_noticed(how):
    model, settings, offset = closure(1)

    def anneal(progress):
        if progress.step == 500 and how == "number":
            settings["shift"] = 2.0
        elif progress.step == 500:
            offset.fill_(2.0)

    options = {"steps": 2000, "lr": 0.02, **COMPILED}
    posterior = fit(model, mean_field_normal(model), torch.tensor(0.0), callbacks=[anneal], **options)
    assert abs(float(posterior.params["AutoNormal.locs.w"]) + 2) < 0.1


def explodes():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("boom", dist.Normal(torch.log(w - 3.0), 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(8.0))
        pyro.sample("w", dist.Normal(loc, 0.01))

    return model, guide


@pytest.mark.parametrize("engine", ["compiled", "eager"])
def test_a_loss_that_stops_being_finite_names_step_and_site(engine):
    model, guide = explodes()
    with pytest.raises(ValueError, match=r"site 'boom' in the model has a log density of nan at step \d+"):
        fit(model, guide, torch.tensor(-9.0), steps=2000, lr=0.1, engine=engine, progress=False)


def test_a_matrix_that_stops_being_positive_definite_is_named_with_its_step():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 10.0))
        tril = torch.linalg.cholesky(torch.eye(2) * (3.0 - w))
        pyro.sample("y", dist.Normal(w + 0 * tril.sum(), 1.0), obs=y)

    guide = mean_field_normal(model, init_loc={"w": 0.0})
    with pytest.raises(ValueError, match=r"the model could not run at step \d+: .*not positive-definite"):
        fit(model, guide, torch.tensor(8.0), steps=2000, lr=0.05, **COMPILED)


def test_the_state_is_put_back_where_the_call_began():
    model, guide = explodes()
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(model, guide, (torch.tensor(-9.0),), stream, CPU, torch.float32)
    engine = CompiledEngine(SVIProblem.on(bound_model, InMemory((torch.tensor(-9.0),)), lr=0.1), stream)
    state = engine.init(stream)
    engine.advance(state, 10)
    flat_params, moments = state.flat_params.clone(), [m.clone() for m in state.moments]
    with pytest.raises(ValueError, match="boom"):
        engine.advance(state, 1000)
    assert torch.equal(state.flat_params, flat_params)
    assert all(torch.equal(a, b) for a, b in zip(state.moments, moments, strict=True))
    assert state.step == 10


def test_a_fit_leaves_the_processes_random_state_and_store_alone():
    torch.manual_seed(3)
    pyro.get_param_store().clear()
    before = torch.get_rng_state()
    fit(linear_regression, mean_field_normal(linear_regression), X, Y, steps=200, **COMPILED)
    assert torch.equal(before, torch.get_rng_state())
    assert len(pyro.get_param_store()) == 0


def test_a_model_and_guide_without_parameters_only_report_their_elbo():
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def guide(y):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    posterior = fit(model, guide, torch.tensor(1.0), steps=400, **COMPILED)
    # E[−log N(1; w, 1)] with w ~ N(0, 1) is log √(2π) + 1, and its sd a draw is √(3/2 − 1/2 + 1) at most 1.6.
    assert abs(posterior.losses.mean() - 1.919) < 5 * 1.6 / 20
