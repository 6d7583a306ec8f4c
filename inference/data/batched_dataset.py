"""Sources of data larger than memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as datasets
import torch

from inference.data.arguments import is_array, plain_tensor, refuse_uneven
from inference.data.iterable_dataset import IterableRows, rows_in
from inference.data.row_arrays import Rows, is_on_disk, rows_of
from inference.data.shuffle_buffer import RUN_BYTES, Blocks, Convert, ShuffleBuffer
from inference.utils.validation import flag, positive_integer

__all__ = ["BatchedDataset", "batches", "is_parquet", "on_disk", "parquet_blocks"]


@dataclass(frozen=True)
class BatchedDataset:
    """Sources of the rows of a fit, read a batch at a time; made by :func:`batches`."""

    sources: tuple[Any, ...]
    num_data: int | None = None
    target: str | None = None
    shuffle: bool = True

    def opened(self, names: list[str], dtype: torch.dtype, seed: int) -> ShuffleBuffer | IterableRows:
        """The rows, in an order that ``seed`` fixes, as tensors for the arguments called ``names``.

        Raises
        ------
        FileNotFoundError, ValueError
            Naming the file, column or argument, if they cannot be had.
        """
        first = self.sources[0]
        if len(self.sources) == 1 and is_parquet(first):
            blocks = parquet_blocks(Path(first), self.target)
        elif self.target is not None:
            raise ValueError(f"target={self.target!r} is a column of Parquet, and the rows are of something else")
        elif all(_has_rows(source) or _is_setting(source) for source in self.sources):
            blocks = _array_blocks(self.sources, names)
        elif len(self.sources) == 1 and (callable(first) or hasattr(first, "__iter__")):
            return IterableRows(first, rows_in(first, self.num_data), _converting(names, dtype), seed)
        else:
            found = [type(source).__name__ for source in self.sources]
            raise ValueError(f"batches cannot take rows from {found}: see its documentation for what it can")
        if self.num_data not in (None, blocks.rows):
            raise ValueError(f"num_data is {self.num_data:,}, and there are {blocks.rows:,} rows: leave it out")
        return ShuffleBuffer(blocks, _converting(names, dtype), self.shuffle, seed)


def batches(
    *sources: Any, num_data: int | None = None, target: str | None = None, shuffle: bool = True
) -> BatchedDataset:
    """Rows that are read a batch at a time, ahead of the steps, to be handed to ``fit`` in place of arrays.

    The model is given one batch after the other, and what is inside its plate
    over the rows counts N/B times: ``pyro.plate("data", len(x))`` is all it needs.
    N is the number of all rows. ``fit(model, guide, batches(…), batch_size=B)``.

    Parameters
    ----------
    sources
        One array an argument of the model: memory-mapped, of Zarr or HDF5, in
        memory, or the path of an ``.npy`` or ``.zarr``; or the path of a Parquet
        file or a folder of them; or what gives batches such as ``(x, y)``: torch's
        DataLoader, a list, a function that returns an iterator.
    num_data
        N, where a source of batches does not know it.
    target
        The column of Parquet that is y; x are all others.
    shuffle
        Each epoch in another order, which ``seed`` fixes: runs of rows that lie
        together (64 KiB, or a chunk of Zarr, a row group of Parquet) are read in
        random order, and their rows mixed in pools of 16 MiB. Batches of a loader
        come in its own order.

    Notes
    -----
    Each row comes once an epoch; what does not fill a batch goes on into the next
    epoch. The posterior keeps the rows of the first batch as its data; what asks
    about all, :meth:`~inference.Posterior.diagnose` and corrected draws, reads them
    again. A loader whose iterator draws from the random numbers of the process is
    not read ahead.

    Raises
    ------
    ValueError
        If there is no source.

    Examples
    --------
    >>> import tempfile, torch
    >>> import numpy as np
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x = np.linspace(-1, 1, 10_000)[:, None]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/x.npy", x)
    ...     np.save(f"{folder}/y.npy", 1 + 2 * x[:, 0])
    ...     rows = batches(f"{folder}/x.npy", f"{folder}/y.npy")
    ...     guide = mean_field_normal(linear_regression)
    ...     posterior = kiln.fit(linear_regression, guide, rows, batch_size=100, steps=500, lr=0.05, progress=False)
    >>> bool(abs(posterior.sample(100)["weights"].mean() - 2) < 0.2)
    True
    """
    if not sources:
        raise ValueError("batches takes what gives the rows, such as batches('x.npy', 'y.npy')")
    count = None if num_data is None else positive_integer(num_data, "num_data")
    return BatchedDataset(sources, count, target, flag(shuffle, "shuffle"))


def on_disk(data: tuple[Any, ...]) -> bool:
    """Return True if some of the arguments are arrays on disk."""
    return any(is_on_disk(value) for value in data)


def _has_rows(source: Any) -> bool:
    return isinstance(source, str | Path) or is_on_disk(source) or (is_array(source) and not isinstance(source, list))


def _is_setting(source: Any) -> bool:
    return source is None or isinstance(source, bool | int | float)


def _array_blocks(sources: tuple[Any, ...], names: list[str]) -> Blocks:
    pairs = zip(sources, names, strict=False)
    parts = []
    for value, name in pairs:
        is_plain = not hasattr(value, "shape") and not isinstance(value, str | Path)
        parts.append(value if _is_setting(value) else rows_of(np.asarray(value) if is_plain else value, name))
    rows = [part for part in parts if isinstance(part, Rows)]
    if not rows:
        raise ValueError("none of the arguments has rows")
    refuse_uneven([(part.name, part.count) for part in rows])
    width = sum(part.row_bytes for part in rows)
    run = max([RUN_BYTES // width, 1, *(part.run for part in rows if part.run)])
    begins = np.arange(0, rows[0].count, run)
    sizes = np.minimum(run, rows[0].count - begins)

    def read(number: int) -> tuple[Any, ...]:
        begin, end = int(begins[number]), int(begins[number] + sizes[number])
        return tuple(part.read(begin, end) if isinstance(part, Rows) else part for part in parts)

    return Blocks(sizes, read, width)


def _converting(names: list[str], dtype: torch.dtype) -> Convert:
    """Return a function that converts a piece of the rows to tensors, given the number of its first row."""

    def convert(values: tuple[Any, ...], first_row: int) -> tuple[Any, ...]:
        pairs = zip(values, names, strict=False)
        return tuple(
            plain_tensor(value, name, dtype, shared=True, first_row=first_row).cpu() if is_array(value) else value
            for value, name in pairs
        )

    return convert


def is_parquet(source: Any) -> bool:
    """Return True if ``source`` is the path of a Parquet file, or of a folder that has some."""
    if not isinstance(source, str | Path):
        return False
    path = Path(source)
    return path.suffix in (".parquet", ".pq") or (path.is_dir() and any(path.glob("*.parquet")))


def parquet_blocks(path: Path, target: str | None) -> Blocks:
    """Row groups as blocks of (x, y), where y is the column ``target`` and x all others; (x,) without a target.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a column is no numbers, there is no target of that name, or no column beside it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    try:
        found = datasets.dataset(path, format="parquet")
        groups = [group for file in found.get_fragments() for group in file.split_by_row_group()]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    columns = found.schema.names
    if target is not None and target not in columns:
        raise ValueError(f"{path} has no column {target!r}: pass target= one of {columns}")
    inputs = [name for name in columns if name != target]
    if not inputs:
        raise ValueError(f"{path} has no column beside the target {target!r}: a model needs inputs")
    for field in found.schema:
        if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_boolean(field.type)):
            raise ValueError(f"column {field.name!r} of {path} is of type {field.type}: convert it to numbers")
    sizes = np.array([group.row_groups[0].num_rows for group in groups])

    def read(number: int) -> tuple[np.ndarray, ...]:
        table = groups[number].to_table(columns=columns)
        x = np.stack([_values(table, name, path) for name in inputs], 1)
        return (x,) if target is None else (x, _values(table, target, path))

    if not sizes.sum():
        raise ValueError(f"{path} has no rows")
    return Blocks(sizes, read, 8 * len(columns))


def _values(table: pa.Table, name: str, path: Path) -> np.ndarray:
    column = table[name]
    if column.null_count:
        raise ValueError(
            f"column {name!r} of {path} has {column.null_count} values missing: fill them in or remove rows"
        )
    return column.to_numpy()
