"""Fits that find their own way: which guides, from which start, in which coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from inference.engine.svi_problem import SVIProblem
from inference.model.protocols import HasScaleTril, supports
from inference.optim.averaged_adam import AveragedAdam
from inference.optim.initialization.guide_placement import place_guide, start_at
from inference.optim.initialization.initial_normal import InitialNormal, NoInitialNormal
from inference.optim.prodigy import Prodigy
from inference.optim.whitening import PathMoments, whitening

__all__ = ["StepPlan", "automatic"]

_MENDING = 2_000  # steps that mend the coordinates of a start that is no mode


@dataclass(frozen=True)
class StepPlan:
    """How a fit is to find its way: from θ = ``theta``, (P,), in at most ``steps``.

    In the coordinates of ``start``, or by steps that need none, for the given ``reason``;
    without ``stop_early`` all steps are taken.
    """

    theta: Tensor
    steps: int
    stop_early: bool
    start: InitialNormal | None = None
    reason: str = ""

    def problem(self, problem: SVIProblem) -> SVIProblem:
        """The task with these steps in the place of an optimiser."""
        problem = replace(problem, optimizer="adam")
        if self.start is None:
            return replace(problem, adaptive=Prodigy(self.theta, self.steps, self.stop_early))
        bound_model, correlated = problem.bound_model, _has_triangle(problem)
        judged = PathMoments(bound_model, self.start) if correlated else None
        white = whitening(bound_model, self.start, self.theta)
        adaptive = AveragedAdam(white, self.theta, self.steps, self.stop_early, judged)
        return replace(problem, adaptive=adaptive, sticking_the_landing=correlated)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan as numbers and tensors, by the names that checkpoints hold."""
        return {
            "theta": self.theta,
            "steps": self.steps,
            "early": self.stop_early,
            "start": None if self.start is None else dict(vars(self.start)),
            "why": self.reason,
        }

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], like: Tensor) -> StepPlan:
        """Return the plan that was saved, its tensors on the device of ``like``."""
        start = None if saved["start"] is None else InitialNormal.from_state_dict(saved["start"], like.device)
        return cls(saved["theta"].to(like), saved["steps"], saved["early"], start, saved["why"])


def automatic(
    problem: SVIProblem,
    start: InitialNormal | NoInitialNormal,
    steps: int,
    stop_early: bool,
    taken: Callable[[SVIProblem, int], Tensor],
) -> tuple[StepPlan, int]:
    """How to find a step size and an end from ``start``, and what that and the start cost in gradients.

    Without a start the guide goes from where it is, by steps of its own; also
    where the search ended at no mode, as it does for the weights of a network,
    but for guides with a triangle, whose many numbers need coordinates. Those are
    then moved for 2,000 of the ``steps``, by ``taken``, and the coordinates made
    anew after it.
    """
    bound_model, reason = problem.bound_model, ""
    if isinstance(start, NoInitialNormal):
        reason = start.reason
    elif not (start.is_mode or _has_triangle(problem)):
        reason = "the search of the mode ended at none"
    if isinstance(start, NoInitialNormal) or reason:
        return StepPlan(bound_model.params.flatten(), steps, stop_early, reason=reason), start.evaluations
    theta = place_guide(bound_model, start)
    if start.is_mode or steps < 3 * _MENDING:
        return StepPlan(theta, steps, stop_early, start), start.evaluations
    theta = taken(StepPlan(theta, _MENDING, stop_early, start).problem(problem), _MENDING)
    mended = StepPlan(theta, steps - _MENDING, stop_early, start_at(bound_model, start, theta))
    return mended, start.evaluations + _MENDING * problem.particles


def _has_triangle(problem: SVIProblem) -> bool:
    return supports(problem.bound_model.guide, HasScaleTril)
