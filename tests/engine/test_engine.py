"""What all engines share: a name, and a state that is saved and goes on to the same numbers."""

import copy

import pytest
import torch

from guides import mean_field_normal
from inference.engine.compiled import CompiledEngine
from inference.engine.eager import EagerEngine
from inference.engine.engine import IterateRecorder
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.utils.random_state import RandomStream
from ppl_models import linear_regression


def engine_of(name, line):
    stream = RandomStream.seeded(0)
    args = (line.x.double(), line.y.double())
    guide = mean_field_normal(linear_regression)
    bound_model = BoundModel.start(linear_regression, guide, args, stream, torch.device("cpu"), torch.float64)
    problem = SVIProblem.on(bound_model, InMemory(args), lr=0.01)
    return EagerEngine(problem) if name == "eager" else CompiledEngine(problem, stream), stream


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_a_saved_state_goes_on_to_the_same_numbers(name, line):
    engine, stream = engine_of(name, line)
    assert engine.name == name
    state = engine.init(stream)
    engine.advance(state, 7)
    saved = copy.deepcopy(engine.state_dict(state))
    expected = engine.advance(state, 5)
    other, fresh = engine_of(name, line)
    resumed = other.init(fresh)
    other.load_state_dict(resumed, saved)
    assert resumed.step == 7
    assert torch.equal(other.advance(resumed, 5), expected)
    assert torch.equal(resumed.flat_params, state.flat_params)


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_iterates_within_a_call_are_kept_where_the_engine_says_so(name, line):
    engine, stream = engine_of(name, line)
    iterates = IterateRecorder(lambda step: step + 4 - step % 4)
    engine.advance(engine.init(stream), 8, iterates)
    assert [step for step, _, _ in iterates.kept] == ([4, 8] if engine.keeps_iterates else [8])
