"""Tables of numbers: what a model is fitted on, from a file or from a data set."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet

__all__ = ["Table", "load_npz", "read_csv", "read_npz", "read_parquet"]

LARGEST = float(np.finfo(np.float32).max)
SAVE_NPZ = "save it with np.savez(path, x=x, y=y)"
BYTES, PACKED = 2**30, 100  # a file unpacks to at most so many, or so many times its own size


@dataclass(frozen=True)
class Table:
    """N rows: inputs x (N, D) with column names, and a target y (N,) or None.

    ``test_rows`` are the indices of a published test split, where there is one.
    """

    x: np.ndarray
    y: np.ndarray | None
    columns: tuple[str, ...]
    target: str
    test_rows: np.ndarray | None = None


def read_csv(path: Path, target: str | None, columns: Sequence[str] | None) -> Table:
    """A comma-separated file with a header line."""
    return _from_frame(_parse(path, _pandas_csv), path, target, columns)


def read_parquet(path: Path, target: str | None, columns: Sequence[str] | None) -> Table:
    """A Parquet file."""
    return _from_frame(_parse(path, _pandas_parquet), path, target, columns)


def read_npz(path: Path, target: str | None, columns: Sequence[str] | None) -> Table:
    """An NPZ file with an array ``x`` (N, D), or (N,), and the target under its name (default ``y``)."""
    name = target or "y"
    arrays = load_npz(path)
    if "x" not in arrays:
        raise ValueError(f"{path} has no array 'x', found {sorted(arrays)}: {SAVE_NPZ}")
    if columns is None and name not in arrays:
        raise ValueError(f"{path} has no target {name!r}, found {sorted(arrays)}: name one with --target")
    x, y = arrays["x"], arrays.get(name)
    if x.dtype.kind not in "fiub" or x.ndim not in (1, 2):
        raise ValueError(f"{path}: x has shape {x.shape} and type {x.dtype}: give numbers of shape (rows, columns)")
    if x.size == 0:
        raise ValueError(f"{path} has no {'columns' if len(x) else 'rows'}: give at least one row and one column in x")
    x = x.reshape(len(x), -1).astype(float)
    names = tuple(columns or (f"x{i}" for i in range(x.shape[1])))
    if len(names) != x.shape[1]:
        raise ValueError(
            f"{path}: x has {x.shape[1]} columns but the fit had {len(names)}, {list(names)}: "
            "give the same columns in the same order"
        )
    for column, values in zip(names, x.T, strict=True):
        _refuse_non_finite(values, column, path)
    if y is not None:
        if y.dtype.kind not in "fiub" or y.shape != (len(x),):
            raise ValueError(f"{path}: {name} has shape {y.shape} and type {y.dtype}: give {len(x)} numbers, one a row")
        y = y.astype(float)
        _refuse_non_finite(y, name, path)
    return Table(x, y, names, name)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an NPZ file, or a ValueError that names it; Python objects are never unpickled."""
    with path.open("rb") as stream:
        try:
            with zipfile.ZipFile(stream) as packed:
                members = packed.infolist()
                _refuse_bomb(path, sum(member.file_size for member in members))
                return {member.filename.removesuffix(".npy"): _array(packed.read(member)) for member in members}
        except (
            *(ValueError, TypeError, EOFError, OSError, RuntimeError, NotImplementedError, MemoryError, struct.error),
            *(zipfile.BadZipFile, zlib.error),
        ) as error:
            problem = "it holds Python objects" if "pickle" in str(error) else error
            raise ValueError(f"{path} cannot be read as NPZ of plain numbers: {problem}; {SAVE_NPZ}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _array(content: bytes) -> np.ndarray:
    found: np.ndarray = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return found


def _refuse_bomb(path: Path, unpacked: int) -> None:
    size = path.stat().st_size
    if unpacked > max(BYTES, PACKED * size):
        raise ValueError(f"its {size:,} bytes would unpack to {unpacked:,}")


def _pandas_parquet(path: Path) -> pd.DataFrame:
    said = pyarrow.parquet.read_metadata(path)
    _refuse_bomb(path, 8 * said.num_rows * said.num_columns)
    return pd.read_parquet(path)


def _pandas_csv(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, index_col=False)
    written = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0]
    if len(written) == len(frame.columns):  # pandas gives a number to a name that comes twice
        frame.columns = pd.Index([name or given for name, given in zip(written, frame.columns, strict=True)])
    return frame


def _parse(path: Path, reader: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            return reader(path)
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty: give a header line and at least one row") from error
    except FileNotFoundError:
        raise
    except Exception as error:
        problem = _first_line(error)
        raise ValueError(f"{path} cannot be read as a table: {problem}; give a whole, undamaged file") from error


def _from_frame(frame: pd.DataFrame, path: Path, target: str | None, columns: Sequence[str] | None) -> Table:
    frame.columns = [str(name) for name in frame.columns]
    if len(frame) == 0:
        raise ValueError(f"{path} has no rows: give at least one row under the header")
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise ValueError(f"{path} has two columns named {twice[0]!r}: give each a name of its own")
    if columns is None:
        return _for_fit(frame, path, target)
    missing = [name for name in columns if name not in frame]
    extra = [name for name in frame if name not in columns and name != target]
    if missing or extra:
        parts = [f"lacks {missing}"] * bool(missing) + [f"has {extra}, which the fit did not see"] * bool(extra)
        raise ValueError(f"{path} {' and '.join(parts)}: give exactly the columns {list(columns)}")
    return Table(_matrix(frame, path, columns), None, tuple(columns), str(target))


def _for_fit(frame: pd.DataFrame, path: Path, target: str | None) -> Table:
    names = list(frame.columns)
    if target is None:
        raise ValueError(f"{path} has columns {names}: say which one to predict with --target")
    if target not in names:
        raise ValueError(f"{path} has no column {target!r}, found {names}: name one of them with --target")
    inputs = [name for name in names if name != target]
    if not inputs:
        raise ValueError(f"{path} has only the target column {target!r}: give at least one column to predict it from")
    return Table(_matrix(frame, path, inputs), _numbers(frame[target], path), tuple(inputs), target)


def _matrix(frame: pd.DataFrame, path: Path, columns: Sequence[str]) -> np.ndarray:
    return np.stack([_numbers(frame[name], path) for name in columns], axis=1)


def _numbers(column: pd.Series, path: Path) -> np.ndarray:
    if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
        text = column[pd.to_numeric(column.astype(str), errors="coerce").isna() & column.notna()]
        found = (text if len(text) else column).iloc[0]
        raise ValueError(
            f"{path}: column {column.name!r} is not numeric, found {found!r}: encode it as numbers or drop it"
        )
    values = column.to_numpy(dtype=float, na_value=np.nan)
    _refuse_non_finite(values, str(column.name), path)
    return values


def _refuse_non_finite(values: np.ndarray, column: str, path: Path) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"{path}: column {column!r} has {bad.sum()} missing or infinite values, the first in row "
            f"{int(bad.argmax())}: impute them or drop those rows"
        )
    if np.abs(values).max() > LARGEST:
        raise ValueError(
            f"{path}: column {column!r} has {np.abs(values).max():.3g} in row {int(np.abs(values).argmax())}, which "
            "single precision cannot hold: give it in larger units"
        )
