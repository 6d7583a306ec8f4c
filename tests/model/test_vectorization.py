"""Many draws at once: the numbers of one at a time, draws that differ, and a way back where it cannot be."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from inference.model.vectorization import map_over_draws
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


def test_an_error_is_the_models_own():
    def run(z):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        map_over_draws(run, {"w": torch.zeros(3)}, 3, at_once=3)
