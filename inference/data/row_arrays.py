"""Arrays with one row an observation, in memory or on disk, of which a few rows are read at a time."""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.data.arguments import is_array, plain_tensor, refuse_uneven

__all__ = ["RowSource", "Rows", "is_on_disk", "rows_of"]


@dataclass(frozen=True)
class Rows:
    """``count`` rows of one shape; ``read(a, b)`` gives rows a to b − 1, (b − a, *shape), in any thread.

    ``run`` is how many rows lie together on disk where that is known, as in a chunk of Zarr.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], Any]
    run: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return max(1, self.dtype.itemsize * int(np.prod(self.shape)))


def is_on_disk(value: Any) -> bool:
    """Return True if ``value`` is an array on disk: memory-mapped, or of Zarr or HDF5."""
    return isinstance(value, np.memmap) or _is_chunked(value)


def _is_chunked(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("zarr", "h5py") and hasattr(value, "chunks")


def rows_of(source: Any, name: str) -> Rows:
    """The rows of an array, a tensor, an array of Zarr or HDF5, or of what is at a path, ``….npy`` or ``….zarr``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it has no rows, is no array of numbers, or is a file of another kind.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix == ".npy":
            found = _of_npy(path)
        elif path.suffix == ".zarr":
            import zarr

            found = _of_array(zarr.open_array(path, mode="r"), path.name)
        else:
            raise ValueError(f"{path} is not an .npy, .zarr or .parquet: give one of these, or an array")
    elif isinstance(source, np.memmap) and (file := _file_of(source)) is not None:
        found = _of_file(*file, source.dtype, source.shape, name)
    elif isinstance(source, np.ndarray | Tensor) or _is_chunked(source):
        found = _of_array(source, name)
    else:
        raise ValueError(
            f"{name} is a {type(source).__name__}: give an array, an array of Zarr or HDF5, or the path of an .npy, "
            ".zarr or .parquet"
        )
    if not found.count:
        raise ValueError(f"{found.name} has no rows")
    if found.dtype.kind not in "fiub":
        raise ValueError(f"{found.name} has dtype {found.dtype}: give numbers")
    return found


def _of_array(array: Any, name: str) -> Rows:
    if not array.shape:
        raise ValueError(f"{name} is a single number: give one row an observation")
    dtype = np.asarray(array[:0]).dtype
    chunks = array.chunks[0] if _is_chunked(array) and array.chunks else None
    return Rows(name, int(array.shape[0]), tuple(array.shape[1:]), dtype, lambda begin, end: array[begin:end], chunks)


def _of_npy(path: Path) -> Rows:
    with path.open("rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(stream)
        except ValueError as error:
            raise ValueError(f"{path} is no array of NumPy: {error}") from error
        offset = stream.tell()
    if not shape:
        raise ValueError(f"{path} is a single number: give one row an observation")
    if by_columns and len(shape) > 1:
        return _of_array(np.load(path, mmap_mode="r", allow_pickle=False), path.name)
    if dtype.hasobject:
        raise ValueError(f"{path} holds Python objects, which are not read: save numbers")
    if path.stat().st_size < offset + dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{path} ends before its {shape[0]:,} rows do: it was not written whole")
    return _of_file(path, offset, dtype, shape, path.name)


def _of_file(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> Rows:
    """Rows read from the file rather than mapped: pages that are mapped count as memory of the process."""
    file = _File(path)
    width = dtype.itemsize * int(np.prod(shape[1:]))

    def read(begin: int, end: int) -> np.ndarray:
        raw = file.read(offset + begin * width, (end - begin) * width)
        return np.frombuffer(raw, dtype).reshape(end - begin, *shape[1:])

    return Rows(name, shape[0], tuple(shape[1:]), dtype, read)


class _File:
    """A file that is open as long as this is there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._handle)

    def read(self, begin: int, size: int) -> bytearray:
        """Bytes ``begin`` to ``begin + size`` − 1."""
        raw = bytearray(size)
        view, done = memoryview(raw), 0
        while done < size:
            got = os.preadv(self._handle, [view[done:]], begin + done)
            if not got:
                raise ValueError(f"{self._path} ended while it was read: something else has changed it")
            done += got
        return raw


def _file_of(array: np.memmap[Any, Any]) -> tuple[Path, int] | None:
    """The file, and where in it, of a memory-mapped array or a part of one, where it lies there row by row."""
    mapped = array._mmap  # type: ignore[attr-defined]
    if mapped is None or array.filename is None or array.mode == "c" or not array.flags.c_contiguous:
        return None
    start = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    return Path(array.filename), start + array.ctypes.data - base


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
        values = list(data)
        for i, (value, name) in enumerate(zip(data, names, strict=True)):
            if isinstance(value, str | Path) or is_on_disk(value):
                values[i] = rows_of(value, name)
            elif is_array(value):
                array = value if isinstance(value, np.ndarray) else plain_tensor(value, name, dtype, shared=True).cpu()
                values[i] = rows_of(array, name) if array.ndim else value
        rows = [(name, value.count) for name, value in zip(names, values, strict=True) if isinstance(value, Rows)]
        refuse_uneven(rows)
        if not rows:
            raise ValueError("out= is for many rows, and there are none: give predict an array with one row or more")
        return cls(tuple(values), tuple(names), rows[0][1])

    def part(self, rows: slice) -> tuple[Any, ...]:
        """These rows of each array, read; what has no rows as it is."""
        return tuple(v.read(rows.start, rows.stop) if isinstance(v, Rows) else v for v in self.values)

    def parts(self, size: int) -> Iterator[tuple[slice, tuple[Any, ...]]]:
        """One ``size`` of rows after the other."""
        for begin in range(0, self.count, size):
            rows = slice(begin, min(begin + size, self.count))
            yield rows, self.part(rows)

    def fingerprint(self, size: int, checked: Checked) -> dict[str, Any]:
        """Read and check the data once, and return type, shape and SHA-256 of each argument."""
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


def _mark(value: Any, rows: int | None, digest: str) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, bool | int | float | str | None) else type(value).__name__
    shape = tuple(value.shape) if rows is None else (rows, *value.shape[1:])
    return f"{str(value.dtype).removeprefix('torch.')} {shape} sha256 {digest}"
