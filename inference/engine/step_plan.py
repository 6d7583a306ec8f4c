"""Fits that find their own way: which guides, from which start, in which coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from inference.engine.svi_problem import Task
from inference.optim.averaged_adam import Landing
from inference.optim.guide_moments import PathMoments
from inference.optim.initialization.guide_placement import apply_start, start_at
from inference.optim.initialization.pathfinder import NoStart, Start, start_again
from inference.optim.prodigy import FoundSteps
from inference.optim.whitening import whitening

__all__ = ["Plan", "automatic"]

_MENDING = 2_000  # steps that mend the coordinates of a start that is no mode


@dataclass(frozen=True)
class Plan:
    """How a fit is to find its way: from θ = ``theta``, (P,), in at most ``steps``.

    In the coordinates of ``start`` where there is one, else by steps of its own, and
    ``why`` says why; without ``early`` all steps are taken.
    """

    theta: Tensor
    steps: int
    early: bool
    start: Start | None = None
    why: str = ""

    def task(self, task: Task) -> Task:
        """The task with these steps in the place of an optimiser."""
        task = replace(task, optimizer="adam")
        if self.start is None:
            return replace(task, landing=FoundSteps(self.theta, self.steps, self.early))
        program, correlated = task.program, _has_triangle(task)
        judged = PathMoments(program, self.start) if correlated else None
        white = whitening(program, self.start, self.theta)
        landing = Landing(white, self.theta, self.steps, self.early, judged)
        return replace(task, landing=landing, sticking=correlated)

    def saved(self) -> dict[str, Any]:
        """The plan as numbers and tensors, for :meth:`restored`."""
        return {**vars(self), "start": None if self.start is None else dict(vars(self.start))}

    @classmethod
    def restored(cls, saved: dict[str, Any], like: Tensor) -> Plan:
        """The plan that was saved, its tensors on the device of ``like``."""
        start = None if saved["start"] is None else start_again(saved["start"], like.device)
        return cls(**{**saved, "theta": saved["theta"].to(like), "start": start})


def automatic(
    task: Task, start: Start | NoStart, steps: int, early: bool, taken: Callable[[Task, int], Tensor]
) -> tuple[Plan, int]:
    """How to find a step size and an end from ``start``, and what that and the start cost in gradients.

    Without a start the guide goes from where it is, by steps of its own; also
    where the search ended at no mode, as it does for the weights of a network,
    but for guides with a triangle, whose many numbers need coordinates. Those are
    then moved for 2,000 of the ``steps``, by ``taken``, and the coordinates made
    anew after it.
    """
    program, unplaced = task.program, _unplaced(task, start)
    if isinstance(start, NoStart) or unplaced:
        return Plan(program.params.flatten(), steps, early, why=unplaced), start.evaluations
    theta = apply_start(program, start)
    if start.is_mode or steps < 3 * _MENDING:
        return Plan(theta, steps, early, start), start.evaluations
    theta = taken(Plan(theta, _MENDING, early, start).task(task), _MENDING)
    mended = Plan(theta, steps - _MENDING, early, start_at(program, start, theta))
    return mended, start.evaluations + _MENDING * task.particles


def _unplaced(task: Task, start: Start | NoStart) -> str:
    """Why the guide goes from where it is; nothing where it goes from ``start``."""
    if isinstance(start, NoStart):
        return start.reason
    return "" if start.is_mode or _has_triangle(task) else "the search of the mode ended at none"


def _has_triangle(task: Task) -> bool:
    return hasattr(task.program.guide, "scale_tril")
