"""How the constants of a recorded step come from the data, so that they can be had for other data without recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from inference.engine.tracing.random_ops import is_random
from inference.engine.tracing.traced_graph import DispatchMode
from inference.engine.tracing.tracer import shape_only

__all__ = ["ConstantProvenance", "Unknown"]

_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_DYNAMIC = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Unknown(Exception):
    """Why what was recorded is of this data alone."""


class ConstantProvenance(DispatchMode):
    """Remember each operator on something that comes from ``data``, inside the block; :meth:`at` goes the way again.

    A mode around that in which a step is recorded.
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
        """Whether a tensor in ``structure`` comes from the data."""
        return any(self._is_known(leaf) for leaf in tree_leaves(structure) if isinstance(leaf, Tensor))

    def refuse(self, reason: str) -> None:
        """Note what makes the record one of this data alone."""
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
        """What ``wanted`` would have been with other data of the same shapes.

        Raises
        ------
        Unknown
            If that cannot be said.
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
    """Notice what reads numbers out of the data without an operator."""

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
