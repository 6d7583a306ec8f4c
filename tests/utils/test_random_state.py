"""Fits do not touch each other, nor anything of the process."""

import random
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import mean_field_normal
from inference import fit
from inference.engine.eager import EagerEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.utils.random_state import RandomStream
from ppl_models import linear_regression

MODEL = partial(linear_regression, noise=0.3)

QUIET = {"steps": 150, "progress": False}


def fitted(line, seed, guide=None, **options):
    return fit(
        MODEL,
        guide or mean_field_normal(MODEL),
        line.x,
        line.y,
        seed=seed,
        **{**QUIET, **options},
    )


def same(one, other):
    draws, others = one.sample(5), other.sample(5)
    return np.array_equal(one.losses, other.losses) and all(torch.equal(draws[n], others[n]) for n in draws)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(line):
    assert same(fitted(line, 3), fitted(line, 3))
    assert not same(fitted(line, 3), fitted(line, 4))


def test_one_guide_object_fitted_twice_starts_afresh(line):
    guide = mean_field_normal(MODEL)
    alone = fitted(line, 1)
    first, second = fitted(line, 0, guide), fitted(line, 1, guide)
    assert same(second, alone)
    assert same(first, fitted(line, 0))
    assert guide.prototype_trace is None


def test_a_fit_inside_a_callback_changes_neither(line):
    inner = []
    outer = fitted(line, 0, callbacks=[lambda progress: inner.append(fitted(line, 1))])
    assert len(inner) == 2
    assert same(outer, fitted(line, 0))
    assert same(inner[0], fitted(line, 1))


def test_two_engines_advanced_in_turn_give_what_each_gives_alone(line):
    def start(seed):
        stream = RandomStream.seeded(seed)
        guide = mean_field_normal(MODEL)
        bound_model = BoundModel.start(MODEL, guide, (line.x, line.y), stream, torch.device("cpu"), torch.float32)
        engine = EagerEngine(SVIProblem.on(bound_model, InMemory((line.x, line.y))))
        return engine, engine.init(stream)

    alone = [engine.advance(state, 60) for engine, state in (start(0), start(1))]
    pair = [start(0), start(1)]
    turns = [[], []]
    for _ in range(6):
        for i, (engine, state) in enumerate(pair):
            turns[i].append(engine.advance(state, 10))
    for losses, expected in zip(turns, alone, strict=True):
        torch.testing.assert_close(torch.cat(losses), expected, rtol=0, atol=0)


def test_pyros_store_and_every_random_state_are_as_they_were(line):
    pyro.clear_param_store()
    mine = pyro.param("AutoNormal.locs.weights", torch.tensor([5.0]))
    torch.manual_seed(11)
    random.seed(11)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), torch.get_default_dtype()
    posterior = fitted(line, 0, dtype=torch.float64)
    posterior.predict(line.x, draws=5)
    posterior.to_arviz(draws=5)
    assert list(pyro.get_param_store()) == ["AutoNormal.locs.weights"]
    assert torch.equal(pyro.param("AutoNormal.locs.weights"), mine)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert torch.get_default_dtype() == before[3]
    pyro.clear_param_store()


def test_a_network_shared_by_two_fits_is_left_as_it_was(line):
    network = nn.Linear(1, 1)
    start = [p.detach().clone() for p in network.parameters()]

    def model(x, y=None):
        pyro.module("network", network)
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(x)[:, 0], sigma), obs=y)

    def run(seed):
        return fit(model, mean_field_normal(model), line.x, line.y, seed=seed, lr=0.05, **QUIET)

    first, second = run(0), run(0)
    assert same(first, second)
    assert first.losses[-20:].mean() < first.losses[:20].mean() - 10
    assert all(torch.equal(a, b) for a, b in zip(start, network.parameters(), strict=True))
    assert all(p.grad is None for p in network.parameters())
    assert not torch.equal(first.params["network$$$weight"], start[0])


def test_a_failed_fit_leaves_the_store_as_it_was(line):
    pyro.clear_param_store()

    def model(x, y=None):
        w = pyro.param("w", torch.tensor(1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(-torch.log(w) * x[:, 0], 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"not finite|of nan"):
        fit(model, mean_field_normal(model), line.x, line.y, lr=5.0, **QUIET)
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("part", ["torch", "numpy", "python"])
def test_a_state_that_no_generator_takes_is_refused_and_the_process_keeps_its_own(part):
    saved = RandomStream.seeded(0).saved()
    harmed = {
        "torch": torch.zeros_like(saved["torch"]),
        "numpy": [*saved["numpy"][:2], 10**6, *saved["numpy"][3:]],
        "python": [saved["python"][0], torch.zeros(3, dtype=torch.int64), None],
    }
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with pytest.raises((ValueError, RuntimeError)):
        RandomStream.restored({**saved, part: harmed[part]})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
