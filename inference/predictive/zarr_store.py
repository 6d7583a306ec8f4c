"""A prediction as a Zarr store, written one batch of rows after the other, of which each is whole or not there.

``zarr.json`` has what the store is of, with a checksum; ``batches`` says which
batches of rows are whole, and is written after them. Zarr replaces a chunk in
one step, and a batch has chunks of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from filelock import FileLock, Timeout
from torch import Tensor
from zarr.codecs import Crc32cCodec

from inference.storage import json_document as document
from inference.storage.atomic_files import ADVICE, read_bytes, replacing
from inference.storage.fit_fingerprint import Fingerprint, describe_differences
from inference.utils.warnings import warn

__all__ = ["SAMPLES", "SUMMARY", "Field", "PredictionStore"]

SCHEMA, SEAL, ABOUT, BATCHES, LOCK = 1, "sha256", "kiln", "batches", ".kiln.lock"
SAMPLES, SUMMARY = "predictions", "summary"  # the groups of arrays
_CHUNK = 2**20  # bytes, of some draws of a batch of rows
_KIND = document.record(
    schema=document.WHOLE,
    kind=document.either("values", "classes"),
    keep=document.either("draws", "summary"),
    site=document.TEXT,
    draws=document.WHOLE,
    rows=document.WHOLE,
    batch_rows=document.WHOLE,
    batch_draws=document.WHOLE,
    quantiles=document.list_of(document.NUMBER),
    identity=document.mapping_of(document.ANY),
    versions=document.mapping_of(document.TEXT),
)


@dataclass(frozen=True)
class Field:
    """Values of an array at some rows, which lie in the dimension ``axis``, and the names of its dimensions."""

    values: Tensor
    axis: int
    dims: tuple[str, ...]


@dataclass(frozen=True)
class PredictionStore:
    """The arrays in the folder ``path``, and ``about``, what they are of."""

    path: Path
    about: dict[str, Any]
    root: zarr.Group

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Any], fields: Mapping[str, Field]) -> PredictionStore:
        """Make the arrays of ``about["rows"]`` rows whose form ``fields`` show at a few rows; nothing, if that fails.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        plain = {"schema": SCHEMA, **about}
        with replacing(path) as partial:
            sealed = {ABOUT: {**plain, SEAL: document.digest(plain)}}
            root = zarr.create_group(partial, attributes=sealed)
            for name, field in fields.items():
                _create_array(root, name, field, about["rows"], about["batch_rows"])
            count = ceil(about["rows"] / about["batch_rows"])
            root.create_array(BATCHES, shape=(count,), dtype="uint8", chunks=(count,), dimension_names=("batch",))
        return cls.open(path, writable=True)

    @classmethod
    def open(cls, path: Path, writable: bool = False) -> PredictionStore:
        """The store in ``path``, finished or not.

        Raises
        ------
        FileNotFoundError
            If there is none.
        ValueError
            If it is something else, or damaged.
        """
        try:
            content = document.parsed(path, read_bytes(path / "zarr.json", document.MOST_BYTES))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is no prediction: give the out= of predict") from error
        about = (content.get("attributes") or {}).get(ABOUT)
        if not isinstance(about, dict):
            raise ValueError(f"{path} was not written by predict: give the out= of one")
        seal = about.pop(SEAL, None)
        document.refuse_damage(path, document.digest(about), seal)
        if about.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {about.get('schema')!r:.40}, and {SCHEMA} is read: make it again")
        document.check(path, about, _KIND)
        if not all(about[name] for name in ("draws", "rows", "batch_rows", "batch_draws")):
            raise ValueError(f"{path} has a prediction of nothing: {ADVICE}")
        return cls(path, about, zarr.open_group(path, mode="r+" if writable else "r"))

    @classmethod
    def found(cls, path: Path, resume: bool) -> PredictionStore | None:
        """The store that is to be gone on with, None where there is nothing.

        Raises
        ------
        ValueError
            If there is one that nobody asked to go on with, or something else.
        """
        if not os.path.lexists(path):
            return None
        try:
            store = cls.open(path, writable=resume)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is there already, and is no prediction: give another name") from error
        if not resume:
            state = f"has a prediction of which {store.whole:,} of {store.rows:,} rows are there"
            if store.is_finished:
                state = f"has a prediction of {store.rows:,} rows already"
            raise ValueError(f"{path} {state}: pass resume=True (or --resume) for that one, or give another name")
        return store

    def refuse_other(self, identity: Fingerprint, versions: Fingerprint) -> None:
        """Raise a ValueError that says what differs, unless the store is of the same prediction.

        Warns where it was begun with other versions of the packages, with which
        the rest may differ in rounding.
        """
        if differ := describe_differences(self.about["identity"], identity):
            raise ValueError(
                f"{self.path} has another prediction: {'; '.join(differ)}: ask for the same, or give another name"
            )
        if differ := describe_differences(self.about["versions"], versions):
            warn(f"{self.path} is of other versions: {'; '.join(differ)}")

    @property
    def rows(self) -> int:
        """N."""
        return int(self.about["rows"])

    @property
    def parts(self) -> list[slice]:
        """The rows of each batch."""
        size = self.about["batch_rows"]
        return [slice(begin, min(begin + size, self.rows)) for begin in range(0, self.rows, size)]

    @property
    def whole(self) -> int:
        """The number of rows that are written."""
        return sum(rows.stop - rows.start for rows, done in zip(self.parts, self._done(), strict=True) if done)

    @property
    def is_finished(self) -> bool:
        """True if all rows are written."""
        return bool(self._done().all())

    def array(self, name: str) -> zarr.Array[Any]:
        """An array of the store, of which parts can be read."""
        with self._damage_of(name):
            found = self.root[name]
        if not isinstance(found, zarr.Array):
            raise ValueError(f"{self.path} has no array {name!r}: {ADVICE}")
        return found

    def read(self, name: str, *index: Any) -> Tensor:
        """Part of an array, or all of it.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        array = self.array(name)
        with self._damage_of(name):
            return torch.from_numpy(np.asarray(array[index or ...]))

    def refuse_gaps(self) -> None:
        """Raise a ValueError unless each array has a file for each batch of rows."""
        for group in (SAMPLES, SUMMARY):
            for name in self.names(group):
                files = sum(path.is_file() for path in (self.path / group / name / "c").rglob("*"))
                if files != len(self.parts):
                    there = f"{files:,} of {len(self.parts):,} batches of rows"
                    raise ValueError(f"{self.path}: array {group}/{name} has {there}: {ADVICE}")

    @contextmanager
    def _damage_of(self, name: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self.path}: {name!r} is damaged ({error}): {ADVICE}") from error

    def names(self, group: str) -> list[str]:
        """Return the names of the arrays in a group."""
        with self._damage_of(group):
            found = self.root.get(group)
            return sorted(name for name, _ in found.arrays()) if isinstance(found, zarr.Group) else []

    @contextmanager
    def writing(self) -> Iterator[Iterator[tuple[int, slice]]]:
        """The batches that are missing, by number and rows, in a block that holds the store for itself.

        Raises
        ------
        ValueError
            If another process writes to it.
        OSError
            If it cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"{self.path} is being written to by another process: wait until it has ended") from error
        except OSError as error:
            raise OSError(f"{self.path} cannot be written ({error.strerror}): see to its permissions") from error
        try:
            for stale in self.path.rglob("*.partial"):
                stale.unlink(missing_ok=True)
            done = self._done()
            yield ((number, rows) for number, rows in enumerate(self.parts) if not done[number])
        finally:
            with suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()

    def write(self, number: int, fields: Mapping[str, Field]) -> None:
        """Write a batch of rows, and then that it is whole.

        Raises
        ------
        OSError
            If it cannot be written; the batches before are then still there.
        """
        rows = self.parts[number]
        try:
            for name, field in fields.items():
                self.array(name)[(slice(None),) * field.axis + (rows,)] = field.values.numpy()
            self.array(BATCHES)[number] = 1
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror or error}): make room there; resume=True (or "
                f"--resume) goes on at row {rows.start:,}"
            ) from error

    def _done(self) -> np.ndarray:
        done = self.read(BATCHES).numpy()
        if done.shape != (len(self.parts),):
            raise ValueError(f"{self.path}: {BATCHES!r} has shape {done.shape}: {ADVICE}")
        return done == 1


def _create_array(root: zarr.Group, name: str, field: Field, rows: int, batch: int) -> None:
    """An array with one file a batch of rows, in which some draws lie together, each piece with a checksum."""
    sample = field.values.numpy()
    before, after = sample.shape[: field.axis], sample.shape[field.axis + 1 :]
    lead = before[-1] if before else 1
    at_once = max(1, _CHUNK // (batch * prod(after) * sample.itemsize))
    piece = ceil(lead / ceil(lead / at_once))
    outer, padded = before[:-1], (piece * ceil(lead / piece),) * bool(before)
    root.create_array(
        name,
        shape=(*before, rows, *after),
        dtype=sample.dtype,
        shards=(*outer, *padded, batch, *after),
        chunks=(*outer, *(piece,) * bool(before), batch, *after),
        compressors=[Crc32cCodec()],  # what is random hardly shrinks
        fill_value=np.nan if sample.dtype.kind == "f" else np.iinfo(sample.dtype).max,
        dimension_names=field.dims,
    )
