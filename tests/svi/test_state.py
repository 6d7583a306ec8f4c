"""State of a fit: the names on disk stay, and what does not have its form is refused in one place."""

from pathlib import Path

import pytest
import torch

from inference.engine.svi_problem import StepPlan
from inference.optim.adaptive import StopReason
from inference.svi.state import FitState, RestartResult, RestartState
from inference.utils.random_state import RandomStream

THETA = torch.tensor([1.0, 2.0])
LIKE = torch.zeros(2)


def state():
    stream = RandomStream.seeded(0)
    stop = StopReason(True, "after 10 steps", 1.0, 0.01, doubts=("the mean of w is off",))
    best = RestartResult(0, THETA, stream, {"steps": 10}, 7, torch.ones(2, 10), stop)
    engine_state = {"step": 3, "flat": THETA, "stream": stream.saved()}
    plan = StepPlan(THETA, 100, True, reason="no mode")
    running = RestartState(THETA, plan, 5, "eager", engine_state, {"next": 4}, torch.ones(2, 3), 1.5)
    return FitState(2.5, [1.0], best, running)


def test_a_state_that_was_written_is_read_back():
    saved = state().state_dict()
    found = FitState.from_state_dict(saved, LIKE, Path("run"))
    assert found.losses == [1.0]
    assert found.best.stop == state().best.stop
    assert found.running.plan.reason == "no mode"
    assert found.running.step == 3
    assert torch.equal(found.running.initial_params, THETA)
    assert found.state_dict().keys() == saved.keys()


def test_the_names_on_disk_are_those_of_0_1_0():
    saved = state().state_dict()
    assert saved.keys() == {"seconds", "losses", "best", "running"}
    running = {"theta", "plan", "searched", "used", "engine", "finding", "curves", "seconds"}
    assert saved["running"].keys() == running
    assert saved["running"]["plan"].keys() == {"theta", "steps", "early", "start", "why"}
    assert saved["best"].keys() == {"number", "flat", "curves", "stop", "searched", "options", "stream"}
    assert saved["best"]["stop"].keys() == {"settled", "how", "rhat", "mcse", "doubts", "interrupted"}


@pytest.mark.parametrize(
    "harm",
    [
        lambda saved: saved.pop("losses"),
        lambda saved: saved["running"].pop("used"),
        lambda saved: saved["running"].update(theta=torch.zeros(3)),
        lambda saved: saved["running"].update(curves=torch.ones(2, 4)),
        lambda saved: saved["running"].update(engine=None),
        lambda saved: saved["best"]["stop"].pop("how"),
        lambda saved: saved.update(seconds="long"),
    ],
)
def test_a_damaged_state_is_refused_and_its_folder_named(harm):
    saved = state().state_dict()
    harm(saved)
    with pytest.raises(ValueError, match="the checkpoint in run is damaged"):
        FitState.from_state_dict(saved, LIKE, Path("run"))
