"""The data and options a caller hands in: checked once, with errors that say what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "argument_names",
    "as_device",
    "as_dtype",
    "as_tensors",
    "check_new_shapes",
    "positive_integer",
    "positive_number",
    "row_count",
    "seed_number",
    "shape_of",
]


_CHECKED = 2**20  # numbers looked at together


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
    data: Sequence[Any], names: Sequence[str], device: torch.device, dtype: torch.dtype, *, shared: bool = False
) -> tuple[Any, ...]:
    """Arrays, frames and tensors as tensors on ``device``; anything else as it is.

    Floating-point values become ``dtype``; integers and booleans keep theirs.
    Arrays are copied, unless they may be ``shared`` for the time of a call.

    Raises
    ------
    ValueError
        Naming the argument: not numeric, empty, NaN or infinite, or with
        another number of rows than the first argument.
    """
    out = tuple(_as_tensor(value, name, device, dtype, shared) for value, name in zip(data, names, strict=True))
    rows = [(name, len(value)) for name, value in zip(names, out, strict=True) if _has_rows(value)]
    for name, count in rows[1:]:
        if count != rows[0][1]:
            raise ValueError(
                f"{rows[0][0]} has {rows[0][1]} rows but {name} has {count}: give every argument one row an observation"
            )
    return out


def row_count(args: Sequence[Any]) -> int | None:
    """N, the rows of the first argument that has any; None where none has."""
    return next((len(value) for value in args if _has_rows(value)), None)


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _as_tensor(value: Any, name: str, device: torch.device, dtype: torch.dtype, shared: bool) -> Any:
    if isinstance(value, Tensor):
        tensor = value.detach()
    elif isinstance(value, np.ndarray | list) or hasattr(value, "__array__"):
        tensor = _from_array(np.asarray(value), name, shared)
    else:
        return value
    if tensor.is_complex():
        raise ValueError(f"{name} is complex ({tensor.dtype}): give real numbers")
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
        _refuse_non_finite(tensor, name)
    if tensor.dim() > 0 and tensor.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(tensor.shape)}): give at least one row and one column")
    return tensor.to(device).contiguous()


def _from_array(array: np.ndarray, name: str, shared: bool) -> Tensor:
    if array.dtype.kind not in "fiubc":
        raise ValueError(f"{name} has dtype {array.dtype}, found {_example(array)!r}: convert it to numbers")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    if shared and array.flags.writeable:  # torch warns of memory that it must not write to
        return torch.from_numpy(np.ascontiguousarray(array))
    return torch.from_numpy(np.array(array, order="C"))


def _example(array: np.ndarray) -> Any:
    return array.reshape(-1)[:1].tolist()[0] if array.size else "nothing"


def _refuse_non_finite(tensor: Tensor, name: str) -> None:
    if all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(_CHECKED)):
        return
    bad = ~torch.isfinite(tensor)
    first = bad.nonzero()[0].tolist()
    where = f"row {first[0]}" if first else "the value"
    if len(first) > 1:
        where += f", column {first[1]}"
    found = tensor[tuple(first)].item()
    raise ValueError(
        f"{name} has {int(bad.sum())} values that are NaN or infinite, the first is {found} at {where}: "
        "remove or impute those rows"
    )


def check_new_shapes(data: Sequence[Any], names: Sequence[str], trained: Sequence[tuple[int, ...] | None]) -> None:
    """Raise unless each new argument has the trained columns (all but the first dimension)."""
    if len(data) > len(trained):
        raise ValueError(f"the fit was given {len(trained)} arguments, this call {len(data)}: give {list(names)}")
    for value, name, shape in zip(data, names, trained, strict=False):
        if not isinstance(value, Tensor) or shape is None:
            continue
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
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda"):
            raise NotImplementedError(found.type)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
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
    if found not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype!r}: pass torch.float32 or torch.float64")
    return found


def positive_integer(value: Any, name: str) -> int:
    """``value`` as an int, or a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}: pass a whole number of at least 1")
    return int(value)


def seed_number(value: Any) -> int:
    """``value`` as a seed from 0 to 2³² − 1, or a ValueError that says so."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**32:
        raise ValueError(f"seed is {value!r}: pass a whole number from 0 to {2**32 - 1}")
    return int(value)


def positive_number(value: Any, name: str) -> float:
    """``value`` as a finite float above 0, or a ValueError that names it."""
    number = float(value) if isinstance(value, int | float | np.number) else float("nan")
    if not (0 < number < float("inf")):
        raise ValueError(f"{name} is {value!r}: pass a number above 0")
    return number
