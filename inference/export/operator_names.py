"""Torch's operators by the names and in the order of arguments that the NumPy table knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inference.export.runtime.operators import OPERATORS
from inference.export.runtime.random_operators import RANDOM

__all__ = ["NON_NUMERIC_ARGUMENTS", "NotExportable", "positional", "table_name", "type_name"]

_PLAIN = {
    "default", "Tensor", "Scalar", "self", "int", "Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor", "Tensor_float",
    "float_Tensor", "float", "ScalarSelf", "ScalarOther",
}  # fmt: skip
NON_NUMERIC_ARGUMENTS = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "generator", "copy"}


class NotExportable(ValueError):
    """Why a model cannot be written as operators of NumPy."""


def positional(node: Any, without_first: bool = False) -> list[Any]:
    """The arguments in the order of torch's schema, without those that say where a tensor lies."""
    func: Any = node.target if isinstance(node, fx.Node) else node.func
    schema = func._schema.arguments[without_first:]
    found = []
    for i, argument in enumerate(schema):
        if argument.name not in NON_NUMERIC_ARGUMENTS:
            default = argument.default_value if argument.has_default_value() else None
            found.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default))
    return found


def table_name(func: Any) -> str:
    """What the operator is called in the table, or one error that names it."""
    schema = getattr(func, "_schema", None)
    packet, _, overload = str(func).removeprefix("aten.").rpartition(".")
    if schema is not None and func.namespace == "aten":
        tables = (RANDOM,) if torch.Tag.nondeterministic_seeded in func.tags else (OPERATORS,)
        bare = packet.removesuffix("_") if schema.is_mutable and tables != (RANDOM,) else packet
        names = [f"{bare}.{overload}", *([bare] if overload in _PLAIN else [])]
        found = next((name for table in tables for name in names if name in table), None)
        if found is not None:
            return found
    raise NotExportable(f"the model uses the operator {func}, which has no NumPy form")


def type_name(dtype: Any) -> str | None:
    """What NumPy calls a type of torch."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name in ("bfloat16", "complex64", "complex128"):
        raise NotExportable(f"the model computes in {name}, which has no NumPy form here")
    return name
