"""The steps of many fits, recorded as few times as they differ."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from inference.engine.batched.constant_provenance import ConstantProvenance, Unknown
from inference.engine.batched.stacked_step import TracedFit
from inference.engine.svi_problem import SVIProblem
from inference.engine.svi_step import trace_step
from inference.model.captured_values import outside_values
from inference.optim.functional import Update
from inference.optim.prodigy import Prodigy
from inference.utils.random_state import RandomStream

__all__ = ["TraceCache"]

# Guides of Pyro's that, for given data, are what their parameters say and nothing else.
_OF_PARAMETERS = (AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal)


@dataclass
class _Known:
    """A recorded step with the arguments of the fit that it was recorded from."""

    recording: TracedFit
    origins: ConstantProvenance
    args: tuple[Any, ...]
    guide: dict[str, object]


class TraceCache:
    """Record each fit's step, or take that of another fit which differs in its data, start and random numbers alone."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[_Known]] = {}

    def record(self, problem: SVIProblem, update: Update, stream: RandomStream, kin: Hashable) -> TracedFit:
        """The step of ``problem``; fits of one ``kin`` are of the same model, guide and kind of batch.

        Raises
        ------
        Untraceable
            With the reason, if it cannot be recorded.
        """
        key = (kin, _kind(problem, update))
        guide = outside_values((problem.bound_model.guide,), by_value=True)
        for known in self._known.setdefault(key, []):
            constants = _at(known, problem.args) if known.guide == guide else None
            if constants is not None:
                sure = constants is known.recording.constants and type(problem.bound_model.guide) in _OF_PARAMETERS
                return replace(known.recording, constants=constants, borrowed=not sure)
        data = [value for value in problem.args if isinstance(value, Tensor)]
        with ConstantProvenance(data) as origins:
            step = trace_step(problem, update, stream, folds=False)
        if any(origins.knows(draw.args, draw.kwargs) for draw in step.draws):
            origins.refuse("it draws from a distribution of the data")
        found = TracedFit.of(step)
        self._known[key].append(_Known(found, origins, problem.args, guide))
        return found


def _at(known: _Known, args: tuple[Any, ...]) -> Sequence[Tensor] | None:
    """The constants of a known step for these arguments, None where they cannot be had."""
    constants = known.recording.constants
    pairs = list(zip(known.args, args, strict=True))
    if any(mine is not other and not isinstance(mine, Tensor) and mine != other for mine, other in pairs):
        return None
    if all(mine is other or not isinstance(mine, Tensor) or torch.equal(mine, other) for mine, other in pairs):
        return constants
    try:
        found = known.origins.at([other for _, other in pairs if isinstance(other, Tensor)], constants)
    except Unknown:
        return None
    same = all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(found, constants, strict=True))
    return found if same else None


def _kind(problem: SVIProblem, update: Update) -> Hashable:
    """What, beside model and guide, decides on the form of a step."""
    adaptive = problem.adaptive
    found = type(adaptive) if adaptive is None or isinstance(adaptive, Prodigy) else id(adaptive)
    optimizer = problem.optimizer if isinstance(problem.optimizer, str) else id(problem.optimizer)
    shapes = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else type(v) for v in problem.args)
    leaves = tuple((name, tuple(leaf.shape)) for name, leaf in problem.bound_model.params.named(problem.begin).items())
    options = (
        problem.particles,
        problem.anneal is None,
        problem.sticking_the_landing,
        str(sorted(update.group.items(), key=str)),
    )
    return found, optimizer, shapes, leaves, options, problem.bound_model.dtype, problem.bound_model.device
