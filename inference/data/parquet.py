"""Rows of Parquet, a file or a folder of them, read a row group at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as datasets

from inference.data.shuffle_buffer import Blocks

__all__ = ["is_parquet", "parquet_blocks"]


def is_parquet(source: Any) -> bool:
    """Whether ``source`` is the path of a Parquet file, or of a folder that has some."""
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
