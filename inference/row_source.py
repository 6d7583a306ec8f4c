"""Rows that lie in memory, in a memory-mapped file or in a Zarr array, of which some are read at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from torch import Tensor

from inference.arguments import refuse_uneven
from inference.arrays import is_array, plain_tensor

__all__ = ["RowSource"]

_SLICED = (Tensor, np.ndarray, zarr.Array, h5py.Dataset)
Checked = Callable[[tuple[Any, ...], slice], tuple[Any, ...]]


@dataclass(frozen=True)
class RowSource:
    """Arguments of a model, one row an observation, that are never held in memory together.

    Arrays that can be sliced are: those of NumPy (``np.memmap``), torch, Zarr
    and HDF5. Anything else that holds numbers is taken into memory.

    >>> source = RowSource.of([np.arange(10.0), 3], ["x", "k"], torch.float32)
    >>> source.count, [rows for rows, _ in source.parts(6)], source.part(slice(8, 10))
    (10, [slice(0, 6, None), slice(6, 10, None)], (array([8., 9.]), 3))
    """

    values: tuple[Any, ...]
    names: tuple[str, ...]
    count: int

    @classmethod
    def of(cls, data: Sequence[Any], names: Sequence[str], dtype: torch.dtype) -> RowSource:
        """The arguments ``data``, of which those that have to be read whole become tensors of ``dtype``.

        Raises
        ------
        ValueError
            If none has rows, or if they have different numbers of them.
        """
        values = tuple(_sliceable(value, name, dtype) for value, name in zip(data, names, strict=True))
        rows = [(name, value.shape[0]) for name, value in zip(names, values, strict=True) if _has_rows(value)]
        refuse_uneven(rows)
        if not rows or not rows[0][1]:
            raise ValueError("out= is for many rows, and there are none: give predict an array with one row or more")
        return cls(values, tuple(names), rows[0][1])

    def part(self, rows: slice) -> tuple[Any, ...]:
        """These rows of each array, read; what has no rows as it is."""
        return tuple(value[rows] if _has_rows(value) else value for value in self.values)

    def parts(self, size: int) -> Iterator[tuple[slice, tuple[Any, ...]]]:
        """One ``size`` of rows after the other."""
        for begin in range(0, self.count, size):
            rows = slice(begin, min(begin + size, self.count))
            yield rows, self.part(rows)

    def marks(self, size: int, checked: Checked) -> dict[str, Any]:
        """What tells the data from other data, read and ``checked`` once from start to end: types, shapes, SHA-256."""
        digests = [hashlib.sha256() for _ in self.values]
        args: tuple[Any, ...] = ()
        for rows, part in self.parts(size):
            args = checked(part, rows)
            for digest, value in zip(digests, args, strict=False):
                if isinstance(value, Tensor):
                    digest.update(np.ascontiguousarray(value.cpu().numpy()).data)
        return {
            name: _mark(value, self.count if _has_rows(given) else None, digest.hexdigest())
            for name, value, given, digest in zip(self.names, args, self.values, digests, strict=False)
        }


def _sliceable(value: Any, name: str, dtype: torch.dtype) -> Any:
    if isinstance(value, _SLICED) or not is_array(value):
        return value
    return plain_tensor(value, name, dtype, shared=True)


def _has_rows(value: Any) -> bool:
    return isinstance(value, _SLICED) and len(value.shape) > 0


def _mark(value: Any, rows: int | None, digest: str) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, bool | int | float | str | None) else type(value).__name__
    shape = tuple(value.shape) if rows is None else (rows, *value.shape[1:])
    return f"{str(value.dtype).removeprefix('torch.')} {shape} sha256 {digest}"
