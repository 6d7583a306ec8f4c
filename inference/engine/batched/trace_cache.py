"""The steps of many fits, traced as few times as they differ.

Two fits of the same model and guide often differ in their data alone. Their
graphs are then the same but for the constants that were computed from the data,
such as a mean or a design matrix. While the first fit is traced,
:class:`ConstantProvenance` notes how each constant came from the data; for the
next fit these operators run again on its own data, and the model does not. If
the way from data to constant is not known, the fit is traced for itself.
"""

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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from inference.engine.batched.stacked_step import TracedFit
from inference.engine.svi_problem import SVIProblem
from inference.engine.svi_step import trace_step
from inference.engine.tracing.random_ops import is_random
from inference.engine.tracing.traced_graph import DispatchMode
from inference.engine.tracing.tracer import shape_only
from inference.model.captured_values import outside_values
from inference.optim.optimizers import Update
from inference.optim.prodigy import Prodigy
from inference.utils.random_state import RandomStream

__all__ = ["ConstantProvenance", "TraceCache", "Unknown"]

# Guides of Pyro's that, for given data, are what their parameters say and nothing else.
_OF_PARAMETERS = (AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal)


@dataclass
class _Known:
    """A traced step with the arguments of the fit that it was traced from."""

    recording: TracedFit
    origins: ConstantProvenance
    args: tuple[Any, ...]
    guide: dict[str, object]


class TraceCache:
    """Trace each fit's step, or take that of another fit that differs in its data, start and random numbers alone."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[_Known]] = {}

    def record(self, problem: SVIProblem, update: Update, stream: RandomStream, kin: Hashable) -> TracedFit:
        """Return the step of ``problem``; fits of one ``kin`` are of the same model, guide and kind of batch.

        A step of another fit is ``borrowed``, and checked by its first loss, unless data and guide are surely the same.

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
    """Return the constants of a known step for these arguments; None if they cannot be computed."""
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
    """Return the static options that determine the form of a step, besides model and guide."""
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


_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_DYNAMIC = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Unknown(Exception):
    """Reason why a trace holds for its own data alone."""


class ConstantProvenance(DispatchMode):
    """Remember each operator on something that comes from ``data``, inside the block; :meth:`at` runs them again.

    A dispatch mode around the tracer's. Tensors are known by their ids, and by the address of their memory if they
    are views that were made where no mode sees it. ``_alive`` keeps them, as ids and addresses are used again.
    """

    def __init__(self, data: Sequence[Tensor]) -> None:
        super().__init__()
        self._data = list(data)
        self._made: dict[int, tuple[Any, Any, Any, int] | None] = {id(value): None for value in data}
        self._alive: list[Any] = list(data)
        self._memory = {_address(value) for value in data}
        self._written: set[int] = set()
        self._reads = _Reads(self)
        self._reason: str | None = None

    def __enter__(self) -> ConstantProvenance:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._reads.__exit__(*details)

    def knows(self, *structure: Any) -> bool:
        """Return True if a tensor in ``structure`` comes from the data."""
        return any(self._is_known(leaf) for leaf in tree_leaves(structure) if isinstance(leaf, Tensor))

    def refuse(self, reason: str) -> None:
        """Note the first reason why the trace holds for its own data alone."""
        self._reason = self._reason or reason

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and remember it if data come in."""
        kwargs = kwargs or {}
        known = not shape_only(func) and self.knows(args, kwargs)
        out = func(*args, **kwargs)
        if not known:
            return out
        if not _DYNAMIC.isdisjoint(func.tags):
            self.refuse(f"it reads values of the data ({func})")
        if func._schema.is_mutable:
            self._written |= {_address(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        for i, leaf in enumerate(tree_leaves(out)):
            if isinstance(leaf, Tensor):
                self._made.setdefault(id(leaf), (func, args, kwargs, i))
                self._memory.add(_address(leaf))
        self._alive.append(out)
        return out

    def at(self, data: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
        """Return what the ``wanted`` tensors would have been with other data of the same shapes.

        Raises
        ------
        Unknown
            If the way from the data to one of them is not known.
        """
        if self._reason is not None:
            raise Unknown(self._reason)
        values = {id(mine): other for mine, other in zip(self._data, data, strict=True)}
        with torch.no_grad():
            return [self._again(value, values) for value in wanted]

    def _again(self, value: Any, values: dict[int, Tensor]) -> Any:
        if not isinstance(value, Tensor) or not self._is_known(value):
            return value
        if id(value) in values:
            return values[id(value)]
        # Memory that was written to holds more than its operator made, and a random number would be another one.
        made = self._made.get(id(value))
        if made is None or _address(value) in self._written or is_random(made[0]):
            raise Unknown(f"a tensor {tuple(value.shape)} comes from the data in a way that is not known")
        func, args, kwargs, part = made
        given, named = tree_map(lambda v: self._again(v, values), (args, kwargs))
        values[id(value)] = tree_leaves(func(*given, **named))[part]
        return values[id(value)]

    def _is_known(self, value: Tensor) -> bool:
        return id(value) in self._made or _address(value) in self._memory


class _Reads(TorchFunctionMode):
    """Notice calls that read numbers out of the data without an operator."""

    def __init__(self, origins: ConstantProvenance) -> None:
        super().__init__()
        self._origins = origins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``."""
        if func in _READS and self._origins.knows(args):
            self._origins.refuse(f"it reads values of the data (Tensor.{func.__name__})")
        return func(*args, **(kwargs or {}))


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
