"""The arguments of a prediction of many rows, of which some rows are read at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.data.arguments import refuse_uneven
from inference.data.array_conversion import is_array, plain_tensor
from inference.data.row_arrays import Rows, is_on_disk, rows_of

__all__ = ["RowSource"]

Checked = Callable[[tuple[Any, ...], slice], tuple[Any, ...]]


@dataclass(frozen=True)
class RowSource:
    """Arguments of a model, one row an observation, that need not be in memory together.

    >>> source = RowSource.of([np.arange(10.0), 3], ["x", "k"], torch.float32)
    >>> source.count, [rows for rows, _ in source.parts(6)], source.part(slice(8, 10))
    (10, [slice(0, 6, None), slice(6, 10, None)], (array([8., 9.]), 3))
    """

    values: tuple[Any, ...]
    names: tuple[str, ...]
    count: int

    @classmethod
    def of(cls, data: Sequence[Any], names: Sequence[str], dtype: torch.dtype) -> RowSource:
        """The arguments ``data``: arrays in memory or on disk, paths of them, and what has no rows.

        Tensors, frames and lists, which are in memory, become tensors of ``dtype``.

        Raises
        ------
        ValueError
            If none has rows, or if they have different numbers of them.
        """
        values = tuple(_with_rows(value, name, dtype) for value, name in zip(data, names, strict=True))
        rows = [(name, value.count) for name, value in zip(names, values, strict=True) if isinstance(value, Rows)]
        refuse_uneven(rows)
        if not rows:
            raise ValueError("out= is for many rows, and there are none: give predict an array with one row or more")
        return cls(values, tuple(names), rows[0][1])

    def part(self, rows: slice) -> tuple[Any, ...]:
        """These rows of each array, read; what has no rows as it is."""
        return tuple(v.read(rows.start, rows.stop) if isinstance(v, Rows) else v for v in self.values)

    def parts(self, size: int) -> Iterator[tuple[slice, tuple[Any, ...]]]:
        """One ``size`` of rows after the other."""
        for begin in range(0, self.count, size):
            rows = slice(begin, min(begin + size, self.count))
            yield rows, self.part(rows)

    def fingerprint(self, size: int, checked: Checked) -> dict[str, Any]:
        """What tells the data from other data, read and ``checked`` once from start to end: types, shapes, SHA-256."""
        digests = [hashlib.sha256() for _ in self.values]
        args: tuple[Any, ...] = ()
        for rows, part in self.parts(size):
            args = checked(part, rows)
            for digest, value in zip(digests, args, strict=False):
                if isinstance(value, Tensor):
                    digest.update(np.ascontiguousarray(value.cpu().numpy()).data)
        return {
            name: _mark(value, self.count if isinstance(given, Rows) else None, digest.hexdigest())
            for name, value, given, digest in zip(self.names, args, self.values, digests, strict=False)
        }


def _with_rows(value: Any, name: str, dtype: torch.dtype) -> Any:
    if isinstance(value, str | Path) or is_on_disk(value):
        return rows_of(value, name)
    if not is_array(value):
        return value
    array = value if isinstance(value, np.ndarray) else plain_tensor(value, name, dtype, shared=True).cpu()
    return rows_of(array, name) if array.ndim else value


def _mark(value: Any, rows: int | None, digest: str) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, bool | int | float | str | None) else type(value).__name__
    shape = tuple(value.shape) if rows is None else (rows, *value.shape[1:])
    return f"{str(value.dtype).removeprefix('torch.')} {shape} sha256 {digest}"
