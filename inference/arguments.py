"""The data and options a caller hands in: checked once, with errors that say what to do."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.arrays import is_array, plain_tensor

__all__ = [
    "argument_names",
    "as_device",
    "as_dtype",
    "as_tensors",
    "check_new_shapes",
    "flag",
    "one_of",
    "positive_integer",
    "positive_number",
    "refuse_uneven",
    "row_count",
    "seed_number",
    "shape_of",
    "share",
]

_MOST = 2**31


def argument_names(model: Callable[..., Any], count: int) -> list[str]:
    """What the model calls its first ``count`` arguments, for messages and for the report."""
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
    out = tuple(
        _as_tensor(value, name, device, dtype, shared, first_row) for value, name in zip(data, names, strict=True)
    )
    refuse_uneven([(name, len(value)) for name, value in zip(names, out, strict=True) if _has_rows(value)])
    return out


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


def _as_tensor(value: Any, name: str, device: torch.device, dtype: torch.dtype, shared: bool, first_row: int) -> Any:
    if not is_array(value):
        return value
    tensor = plain_tensor(value, name, dtype, shared, first_row)
    if tensor.dim() > 0 and tensor.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(tensor.shape)}): give at least one row and one column")
    return tensor.to(device).contiguous()


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


def as_device(device: str | torch.device) -> torch.device:
    """The device to run on; ``"auto"`` takes a CUDA GPU where there is one.

    Raises
    ------
    ValueError
        If this machine does not have the device.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda"):
            raise NotImplementedError(found.type)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device {str(device)!r} is not on this machine, which has {have}: pass one of them"
        ) from error
    return found


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The floating-point type of data and parameters; None is torch's default."""
    if dtype is None:
        return torch.get_default_dtype()
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype!r}: pass torch.float32 or torch.float64")
    return found


def positive_integer(value: Any, name: str) -> int:
    """``value`` as an int from 1 to 2³¹ − 1, or a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}: pass a whole number of at least 1")
    if value >= _MOST:
        raise ValueError(f"{name} is {value!r}: pass a whole number below {_MOST}")
    return int(value)


def seed_number(value: Any) -> int:
    """``value`` as a seed from 0 to 2³² − 1, or a ValueError that says so."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**32:
        raise ValueError(f"seed is {value!r}: pass a whole number from 0 to {2**32 - 1}")
    return int(value)


def positive_number(value: Any, name: str) -> float:
    """``value`` as a finite float above 0, or a ValueError that names it."""
    number = _float(value)
    if not (0 < number < math.inf):
        raise ValueError(f"{name} is {value!r}: pass a number above 0")
    return number


def share(value: Any, name: str) -> float:
    """``value`` as a float between 0 and 1, or a ValueError that names it."""
    number = _float(value)
    if not 0 < number < 1:
        raise ValueError(f"{name} is {value!r}: pass a share between 0 and 1, such as 0.9")
    return number


def _float(value: Any) -> float:
    """``value`` as a float, NaN where it is no number or none that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def flag(value: Any, name: str) -> bool:
    """``value`` as a bool, or a ValueError that names it."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r}: pass True or False")
    return bool(value)


def one_of(value: Any, name: str, choices: Sequence[str]) -> str:
    """``value``, if it is one of the ``choices``, or a ValueError that names it."""
    if isinstance(value, str) and value in choices:
        return value
    known = list(map(repr, choices))
    raise ValueError(f"{name} is {value!r}: pass {' or '.join([*filter(None, [', '.join(known[:-1])]), known[-1]])}")
