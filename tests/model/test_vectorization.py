"""Many draws at once: the numbers of one at a time, draws that differ, and a way back where it cannot be."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import mean_field_normal
from inference import fit
from inference.model.vectorization import map_over_draws, remembering
from inference.utils.random_state import RandomStream


def calls_of(run):
    """``run`` and a list that gets longer with every call."""
    calls = []

    def counted(z):
        calls.append(1)
        return run(z)

    return counted, calls


def test_what_is_computed_together_is_what_is_computed_one_by_one():
    latents = {"w": torch.randn(7, 3, 2), "b": torch.randn(7)}
    x = torch.randn(5, 3)
    run, calls = calls_of(lambda z: {"f": x @ z["w"] + z["b"], "x": x})
    found = map_over_draws(run, latents, 7, at_once=3)
    torch.testing.assert_close(found["f"], x @ latents["w"] + latents["b"][:, None, None])
    torch.testing.assert_close(found["x"], x.expand(7, 5, 3))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("fn", "together"),
    [
        (dist.Normal(torch.zeros(2), 1.0), True),
        (dist.Exponential(torch.ones(2)), True),
        (dist.HalfCauchy(torch.ones(2)), True),
        (dist.Categorical(torch.ones(2, 50)), True),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), True),
        (dist.Dirichlet(torch.ones(2)), False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else "",
)
def test_random_numbers_differ_from_draw_to_draw_and_follow_the_seed(fn, together):
    def drawn(seed):
        run, calls = calls_of(lambda _: fn.sample())
        with RandomStream.seeded(seed).active():
            return map_over_draws(run, {}, 400, at_once=400), len(calls)

    (values, calls), (again, _), (others, _) = drawn(0), drawn(0), drawn(1)
    assert calls == (1 if together else 401)
    torch.testing.assert_close(values, again, rtol=0, atol=0)
    assert not torch.equal(values, others)
    assert len(values[:, 0].unique()) > 40


def test_the_draws_have_their_distribution():
    """The quartiles of 20,000 draws of a HalfCauchy, with a standard error of 0.0031 in probability."""
    with RandomStream.seeded(0).active():
        values = map_over_draws(lambda _: dist.HalfCauchy(torch.ones(())).sample(), {}, 20_000, at_once=6000)
    for share in (0.25, 0.5, 0.75):
        assert abs((values < np.tan(np.pi / 2 * share)).float().mean() - share) < 5 * 0.0031


@pytest.mark.parametrize(
    "run",
    [
        lambda z: z["w"].abs() if z["w"].sum() > 0 else -z["w"].abs(),
        lambda z: z["w"] * z["w"].sum().item(),
        lambda z: z["w"] + torch.as_tensor(z["w"].numpy()),
    ],
    ids=["branch", "item", "numpy"],
)
def test_what_needs_a_value_runs_for_each_draw(run):
    latents = {"w": torch.randn(6, 2)}
    expected = torch.stack([run({"w": row}) for row in latents["w"]])
    torch.testing.assert_close(map_over_draws(run, latents, 6, at_once=4), expected)


def test_numbers_that_numpy_drew_are_not_shared_by_the_draws():
    with RandomStream.seeded(0).active():
        values = map_over_draws(lambda z: z["w"] + np.random.normal(), {"w": torch.zeros(5)}, 5, at_once=5)
    assert len(values.unique()) == 5


@pytest.mark.parametrize(
    "run",
    [
        lambda z: z["w"] + torch.randn(2) if z["w"].sum() > 0 else z["w"] - torch.rand(2),
        lambda z: z["w"] + torch.randn(2) + torch.randn(2)[:1].nonzero().sum() * z["w"].nonzero().sum(),
        lambda z: z["w"] + torch.randn(2) + np.random.normal(),
    ],
    ids=["branch", "operator", "numpy"],
)
def test_the_draws_of_a_loop_do_not_depend_on_the_block_size(run):
    latents = {"w": torch.randn(5, 2)}

    def drawn(at_once):
        with RandomStream.seeded(0).active():
            return map_over_draws(run, latents, 5, at_once)

    with RandomStream.seeded(0).active():
        expected = torch.stack([run({"w": row}) for row in latents["w"]])
    for at_once in (1, 2, 4):
        assert torch.equal(drawn(at_once), expected)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("mine"),
        ValueError("mine"),
        torch.OutOfMemoryError("mine"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. mine"),
    ],
    ids=["key", "value", "gpu memory", "memory"],
)
def test_an_error_that_is_not_of_vmap_is_raised_after_one_run(error):
    def fails(z):
        raise error

    run, calls = calls_of(fails)
    with pytest.raises(type(error), match="mine"):
        map_over_draws(run, {"w": torch.zeros(3)}, 3, at_once=3)
    assert len(calls) == 1


def test_a_warning_of_a_slow_operator_that_is_an_error_leads_to_the_loop():
    run, calls = calls_of(lambda z: z["w"].clone().clamp_(min=0.5))  # pytest's filters make it one
    found = map_over_draws(run, {"w": torch.arange(3.0)}, 3, at_once=3)
    assert (found.tolist(), len(calls)) == ([0.5, 1.0, 2.0], 1 + 3)


def test_a_runtime_error_of_the_function_is_raised_without_that_of_the_attempt():
    def run(z):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        map_over_draws(run, {"w": torch.zeros(3)}, 3, at_once=3)
    assert caught.value.__context__ is None


def test_what_ran_one_by_one_is_remembered_for_that_function_alone():
    branch, branch_calls = calls_of(lambda z: z["w"] if z["w"].sum() > 0 else -z["w"])
    plain, plain_calls = calls_of(lambda z: z["w"])

    def runs_branch(z):
        return branch(z)

    def runs_plain(z):
        return plain(z)

    latents, seen = {"w": torch.randn(4, 2)}, set()
    for run in (runs_branch, runs_plain, runs_branch, runs_plain):
        with remembering(seen):
            map_over_draws(run, latents, 4, at_once=4)
    assert len(branch_calls) == (1 + 4) + 4
    assert len(plain_calls) == 2
    map_over_draws(runs_branch, latents, 4, at_once=4)
    assert len(branch_calls) == 9 + 5


X = torch.linspace(-1.0, 1.0, 6)


def branching(x, y=None):
    branching.calls += 1
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    scale = 1.0 if w > 0 else 2.0
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, scale), obs=y)


branching.calls = 0


def fitted():
    return fit(branching, mean_field_normal(branching), X, X, steps=5, engine="eager", progress=False)


def test_the_predictions_of_a_model_with_a_branch_do_not_depend_on_the_block_size(monkeypatch):
    found = []
    for numbers in (2**22, 2**13, 2**11):
        monkeypatch.setattr("inference.model.vectorization._NUMBERS", numbers)
        found.append(fitted().predict(X, draws=5).samples)
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_fitted_model_with_a_branch_is_tried_once_and_its_draws_do_not_depend_on_that():
    posterior, counts, found = fitted(), [], []
    first = fitted().sample(5)
    for _ in range(2):
        before = branching.calls
        found.append(posterior.predict(X, draws=5).samples)
        counts.append(branching.calls - before)
    assert counts == [1 + 5, 5]
    assert torch.equal(*found)
    assert all(torch.equal(value, first[name]) for name, value in posterior.sample(5).items())


def test_a_model_that_raises_an_error_of_its_own_runs_once_and_is_named():
    scales, calls = {6: 1.0}, []

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        calls.append(1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, scales[len(x)]), obs=y)

    posterior = fit(model, mean_field_normal(model), X, X, steps=5, engine="eager", progress=False)
    calls.clear()
    with pytest.raises(ValueError, match=r"the model 'model' could not run on data of shapes"):
        posterior.predict(X[:4], draws=5)
    assert len(calls) == 1
