"""Fits that find their own way: which guides, from which start, in which coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from inference.found_steps import FoundSteps
from inference.landing import Landing
from inference.moments import PathMoments
from inference.placing import apply_start, start_at
from inference.start import NoStart, Start
from inference.task import Task
from inference.whitening import whitening

__all__ = ["automatic", "unplaced"]

_MENDING = 2_000  # steps that mend the coordinates of a start that is no mode


def automatic(
    task: Task, start: Start | NoStart, steps: int, early: bool, taken: Callable[[Task, int], Tensor]
) -> tuple[Task, int]:
    """The task with a step size and an end to be found from ``start``, and what that and the start cost in gradients.

    Without a start the guide goes from where it is, by steps of its own; also
    where the search ended at no mode, as it does for the weights of a network,
    but for guides with a triangle, whose many numbers need coordinates. Those are
    then moved for 2,000 of the ``steps``, by ``taken``, and the coordinates made
    anew after it. Without ``early`` all steps are taken.
    """
    task = replace(task, optimizer="adam")
    if isinstance(start, NoStart) or unplaced(task, start):
        found = FoundSteps(task.program.params.flatten(), steps, early)
        return replace(task, landing=found), start.evaluations
    if start.is_mode or steps < 3 * _MENDING:
        return _landed(task, start, steps, early), start.evaluations
    theta = taken(_landed(task, start, _MENDING, early), _MENDING)
    mended = _landed(task, start_at(task.program, start, theta), steps - _MENDING, early, theta)
    return mended, start.evaluations + _MENDING * task.particles


def unplaced(task: Task, start: Start | NoStart) -> str:
    """Why the guide goes from where it is; nothing where it goes from ``start``."""
    if isinstance(start, NoStart):
        return start.reason
    return "" if start.is_mode or _has_triangle(task) else "the search of the mode ended at none"


def _landed(task: Task, start: Start, steps: int, early: bool, theta: Tensor | None = None) -> Task:
    """The steps from ``start``, or from a ``theta`` whose spread it has."""
    program, correlated = task.program, _has_triangle(task)
    theta = apply_start(program, start) if theta is None else theta
    judged = PathMoments(program, start) if correlated else None
    landing = Landing(whitening(program, start, theta), theta, steps, early, judged)
    return replace(task, landing=landing, sticking=correlated)


def _has_triangle(task: Task) -> bool:
    return hasattr(task.program.guide, "scale_tril")
