"""The data arguments of fit and predict: arrays, frames and tensors of any kind, checked and as plain tensors."""

from __future__ import annotations

import hashlib
import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "argument_names",
    "as_tensors",
    "check_new_shapes",
    "is_array",
    "plain_tensor",
    "refuse_uneven",
    "row_count",
    "sha256_of",
    "shape_of",
]

_CHECKED = 2**20  # numbers looked at together
_WIDE = (torch.uint16, torch.uint32, torch.uint64)  # for which torch has few operators
_CONVERT = "convert it to numbers, for example by .astype(float)"


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


def is_array(value: Any) -> bool:
    """Return True if ``value`` is a tensor, an array, a frame, or a list."""
    return isinstance(value, Tensor | np.ndarray | list) or hasattr(value, "__array__")


def plain_tensor(value: Any, name: str, dtype: torch.dtype, shared: bool = False, first_row: int = 0) -> Tensor:
    """The numbers of ``value`` as a dense tensor, where it is; floating-point ones as ``dtype``.

    Arrays are copied, unless they may be ``shared`` for the time of a call.
    ``first_row`` is the number of the first row, where they are a part of more.

    Raises
    ------
    ValueError
        With the name: where there are no numbers, or some that are masked, NaN,
        infinite, complex, or too large for the type they would get.
    """
    if isinstance(value, Tensor):
        tensor = _dense(value, name)
    elif isinstance(value, np.ndarray):
        tensor = _from_array(value, name, shared)
    else:
        tensor = _from_array(_read(value, name), name, shared)
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not _is_finite(converted):
        _refuse_non_finite(tensor, converted, name, first_row)
    return converted


def _dense(value: Tensor, name: str) -> Tensor:
    if value.is_complex():
        raise ValueError(f"{name} is complex ({value.dtype}): give real numbers")
    if value.is_meta:
        raise ValueError(f"{name} is on the device 'meta', without values: give a tensor that holds numbers")
    if value.is_quantized:
        raise ValueError(f"{name} is quantised ({value.dtype}): give {name}.dequantize()")
    if value.is_nested:
        raise ValueError(f"{name} is a nested tensor, of rows that differ in length: pad them to one length")
    if value.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({value.layout}): give {name}.to_dense()")
    tensor = (value.clone() if value.is_inference() else value).detach().resolve_neg()
    if tensor.dtype not in _WIDE:
        return tensor
    signed = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and bool((signed < 0).any()):
        _refuse_unsigned(name)
    return signed


def _read(value: Any, name: str) -> np.ndarray:
    """Lists, frames and whatever else NumPy can read."""
    try:
        array = np.asarray(value)
    except Exception as error:
        problem = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"{name} cannot be read as an array: {problem}; give rows of numbers, all as long") from error
    if array.dtype.kind != "O" or array.ndim != 2 or not hasattr(value, "items"):
        return array
    columns = []  # of a frame, with types of their own
    for label, values in value.items():
        column = np.asarray(values)
        _refuse_no_numbers(column, f"column {label!r} of {name}")
        columns.append(column)
    return np.stack(columns, axis=1)


def _from_array(array: np.ndarray, name: str, shared: bool) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        array = _unmasked(array, name)
    _refuse_no_numbers(array, name)
    if array.dtype.kind == "c":
        raise ValueError(f"{name} is complex ({array.dtype}): give real numbers")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            _refuse_unsigned(name)
        array = array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = _narrowed(array, name)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if shared and array.flags.writeable:  # torch warns of memory that it must not write to
        return torch.from_numpy(np.asarray(array, order="C"))
    return torch.from_numpy(np.array(array, order="C"))


def _unmasked(array: np.ma.MaskedArray[Any, Any], name: str) -> np.ndarray:
    masked = np.ma.getmaskarray(array)
    if masked.any():
        raise ValueError(
            f"{name} has {int(masked.sum())} values that are masked, the first at {_place(masked)}: "
            "fill them in or remove those rows"
        )
    return np.asarray(array.data)


def _narrowed(array: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float64)
    lost = np.isfinite(array) & ~np.isfinite(narrow)
    if lost.any():
        raise ValueError(
            f"{name} has numbers too large for float64, the first at {_place(lost)}: give it in larger units"
        )
    return narrow


def _refuse_no_numbers(array: np.ndarray, name: str) -> None:
    if array.dtype.kind not in "fiubc":
        values = array.reshape(-1).tolist()
        example = next((v for v in values if not isinstance(v, numbers.Number)), values[0] if values else "nothing")
        raise ValueError(f"{name} has dtype {array.dtype}, found {example!r}: {_CONVERT}")


def _refuse_unsigned(name: str) -> None:
    raise ValueError(f"{name} has whole numbers of 2**63 or more, too large for int64: give them as floats")


def _is_finite(tensor: Tensor) -> bool:
    """Return True if all numbers are finite; a finite sum, which is many times as fast, shows it."""
    parts = tensor.reshape(-1).split(_CHECKED)
    return all(math.isfinite(float(part.sum())) or bool(torch.isfinite(part).all()) for part in parts)


def _refuse_non_finite(given: Tensor, converted: Tensor, name: str, first_row: int) -> None:
    bad = ~torch.isfinite(given)
    if bool(bad.any()):
        found, advice = "that are NaN or infinite", "remove or impute those rows"
    else:
        bad = ~torch.isfinite(converted)
        found = f"too large for {str(converted.dtype).removeprefix('torch.')}"
        advice = "pass dtype=torch.float64, or give it in larger units"
    first = given[bad][0].item()
    place = _place(bad.cpu().numpy(), first_row)
    raise ValueError(f"{name} has {int(bad.sum())} values {found}, the first is {first} at {place}: {advice}")


def _place(bad: np.ndarray, first_row: int = 0) -> str:
    """Return row and column of the first one that is marked."""
    if not bad.ndim:
        return "the value"
    first = np.argwhere(bad)[0]
    return f"row {first_row + first[0]}" + (f", column {first[1]}" if len(first) > 1 else "")


def sha256_of(*arrays: np.ndarray) -> str:
    """Return the SHA-256 of shapes, types and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, str(array.dtype))).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
