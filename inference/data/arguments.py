"""The data arguments of fit and predict, checked and as tensors."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inference.data.array_conversion import is_array, plain_tensor

__all__ = ["argument_names", "as_tensors", "check_new_shapes", "refuse_uneven", "row_count", "shape_of"]


def argument_names(model: Callable[..., Any], count: int) -> list[str]:
    """Return the model's names of its first ``count`` arguments, for messages and the report."""
    try:
        signature = inspect.signature(getattr(model, "forward", model))
    except (TypeError, ValueError):
        return [f"argument {i}" for i in range(count)]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in kinds]
    return [names[i] if i < len(names) else f"argument {i}" for i in range(count)]


def as_tensors(
    data: Sequence[Any],
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    shared: bool = False,
    first_row: int = 0,
) -> tuple[Any, ...]:
    """Arrays, frames and tensors as tensors on ``device``; anything else as it is.

    Floating-point values become ``dtype``; integers and booleans keep theirs.
    Arrays are copied, unless they may be ``shared`` for the time of a call. ``first_row`` is the
    number of the first row, where they are a part of more.

    Raises
    ------
    ValueError
        Naming the argument: not numeric, empty, masked, NaN or infinite, too large
        for ``dtype``, or with another number of rows than the first argument.
    """
    out = []
    for value, name in zip(data, names, strict=True):
        if not is_array(value):
            out.append(value)
            continue
        tensor = plain_tensor(value, name, dtype, shared, first_row)
        if tensor.dim() > 0 and tensor.numel() == 0:
            raise ValueError(f"{name} is empty (shape {tuple(tensor.shape)}): give at least one row and one column")
        out.append(tensor.to(device).contiguous())
    refuse_uneven([(name, len(value)) for name, value in zip(names, out, strict=True) if _has_rows(value)])
    return tuple(out)


def refuse_uneven(rows: Sequence[tuple[str, int]]) -> None:
    """Raise a ValueError unless all arguments, given by name and rows, have as many rows."""
    for name, count in rows[1:]:
        if count != rows[0][1]:
            raise ValueError(
                f"{rows[0][0]} has {rows[0][1]:,} rows but {name} has {count:,}: "
                "give every argument one row an observation"
            )


def row_count(args: Sequence[Any]) -> int | None:
    """N, the rows of the first argument that has any; None where none has."""
    return next((len(value) for value in args if _has_rows(value)), None)


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def check_new_shapes(data: Sequence[Any], names: Sequence[str], trained: Sequence[tuple[int, ...] | None]) -> None:
    """Raise unless each new argument has the trained columns (all but the first dimension), or is None."""
    if len(data) > len(trained):
        raise ValueError(f"the fit was given {len(trained)} arguments, this call {len(data)}: give {list(names)}")
    for value, name, shape in zip(data, names, trained, strict=False):
        if value is None or shape is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is {reprlib.repr(value)} but the fit saw an array of shape {shape}: give one")
        found = tuple(value.shape)
        if len(found) != len(shape) or found[1:] != shape[1:]:
            raise ValueError(
                f"{name} has shape {found} but the fit saw {shape}: "
                f"give rows of shape {shape[1:]}, in the same order of columns"
            )
