"""Fits that find their own way: which guides, from which start, in which coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from inference.found_steps import FoundSteps
from inference.landing import Landing
from inference.moments import Moments
from inference.placing import apply_start, start_at
from inference.start import NoStart, Start
from inference.task import Task
from inference.whitening import whitening

__all__ = ["automatic"]

_MENDING = 2_000  # steps that mend the coordinates of a start that is no mode
_FEW = 50  # latents up to which the best Normal on the way to no mode is a start


def automatic(
    task: Task, start: Start | NoStart, steps: int, early: bool, taken: Callable[[Task, int], Tensor]
) -> tuple[Task, int]:
    """The task with a step size and an end to be found from ``start``, and what that and the start cost in gradients.

    Without a start the guide goes from where it is, by steps of its own. From
    one that is no mode, whose curvature says little, it is first moved for 2,000
    of the ``steps``, by ``taken``, and the coordinates are made after it. Without
    ``early`` all steps are taken.
    """
    program = task.program
    correlated = hasattr(program.guide, "scale_tril")
    task = replace(task, optimizer="adam", sticking=correlated)
    if isinstance(start, Start) and not start.is_mode and len(start.loc) > _FEW:
        start = NoStart(f"the search of {len(start.loc)} latents ended at no mode", start.evaluations)
    if isinstance(start, NoStart):
        found = FoundSteps(program.params.flatten(), steps, early)
        return replace(task, sticking=False, landing=found), start.evaluations
    theta = apply_start(program, start)
    coordinates, cost = whitening(program, start, theta), start.evaluations
    if not start.is_mode and steps >= 3 * _MENDING:
        theta = taken(replace(task, landing=Landing(coordinates, theta, _MENDING)), _MENDING)
        start = start_at(program, start, theta)
        coordinates = whitening(program, start, theta)
        steps, cost = steps - _MENDING, cost + _MENDING * task.particles
    judged = Moments(program, start) if correlated else None
    return replace(task, landing=Landing(coordinates, theta, steps, early, judged)), cost
