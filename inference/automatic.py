"""Fits that find their own way: which guides, from which start, in which coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from torch import Tensor
from tqdm.auto import tqdm

from inference.isolation import RandomStream
from inference.landing import Landing
from inference.moments import Moments
from inference.placing import apply_start, start_at
from inference.start import NoStart, Start, find_start
from inference.task import Task
from inference.whitening import whitening

__all__ = ["automatic"]

_MENDING = 2_000  # steps that mend the coordinates of a start that is no mode
_FEW = 50  # latents up to which the best Normal on the way to no mode is a start
_NORMALS = (AutoNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal)  # beside those with a triangle


def automatic(
    task: Task, stream: RandomStream, steps: int, asked: bool, taken: Callable[[Task, int], Tensor], progress: bool
) -> tuple[Task, int]:
    """The task with a start, a step size and an end to be found, and what the search cost in gradients.

    The task as it is, with a warning where this was ``asked`` for, if there is
    no such start; where it was not, also for guides that are neither Normals
    nor flows with a triangle behind their layers. From a
    start that is no mode, whose curvature says little, the guide is first moved
    for 2,000 of the ``steps``, by ``taken``, and the coordinates are made after it.
    """
    program = task.program
    correlated = hasattr(program.guide, "scale_tril")
    if not asked and not correlated and not isinstance(program.guide, _NORMALS):
        return task, 0
    task = replace(task, optimizer="adam", sticking=correlated)
    with tqdm(desc="start", bar_format="{desc} {elapsed}", disable=not progress, leave=False):
        start = find_start(program, task.args, stream)
    if isinstance(start, Start) and not start.is_mode and len(start.loc) > _FEW:
        start = NoStart(f"the search of {len(start.loc)} latents ended at no mode", start.evaluations)
    if isinstance(start, NoStart):
        if asked:
            warnings.warn(f"no start was found, so this is Adam with the usual steps: {start.reason}", stacklevel=4)
        return replace(task, sticking=False), start.evaluations
    theta = apply_start(program, start)
    coordinates, cost = whitening(program, start, theta), start.evaluations
    if not start.is_mode and steps >= 3 * _MENDING:
        theta = taken(replace(task, landing=Landing(coordinates, theta, _MENDING)), _MENDING)
        start = start_at(program, start, theta)
        coordinates = whitening(program, start, theta)
        steps, cost = steps - _MENDING, cost + _MENDING * task.particles
    judged = Moments(program, start) if isinstance(program.guide, AutoNormalizingFlow) else None
    return replace(task, landing=Landing(coordinates, theta, steps, judged)), cost
