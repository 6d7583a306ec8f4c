"""Double precision for a model that was written in single."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["InDouble"]

_SINGLE, _DOUBLE = torch.float32, torch.float64
_OPERATORS = ("__matmul__", "__rmatmul__")


class InDouble(TorchFunctionMode):
    """Single-precision constants of model and guide join an operation with double ones as double.

    ``met`` says whether there were any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        found = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        name = getattr(func, "__name__", "")
        if _SINGLE not in found or _DOUBLE not in found or (name.endswith("_") and name not in _OPERATORS):
            return func(*args, **kwargs)
        self.met = True
        args, kwargs = tree_map(_doubled, (args, kwargs))
        return func(*args, **kwargs)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == _SINGLE else value
