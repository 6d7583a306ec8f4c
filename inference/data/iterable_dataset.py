"""Rows from anything that can be iterated: torch's DataLoader, a list of batches, a function that makes an iterator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from inference.data.shuffle_buffer import Convert

__all__ = ["IterableRows", "rows_in"]

_GROUP_BYTES, _GROUP_SECONDS = 2**20, 0.002  # that batches are collected for, to be handed on together
_SETTINGS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class IterableRows:
    """The batches of ``source``, again and again; ``num_data`` are the rows of them all."""

    source: Any
    num_data: int
    convert: Convert
    seed: int

    def rows(self, start: int) -> Iterator[tuple[Any, ...]]:
        """The rows from number ``start`` on, for ever: first one batch, then as many together as come at once."""
        group = _RowBuffer(self.convert)
        try:
            for batch, first_row in self._batches(start):
                if not group.takes(batch, first_row):
                    yield from group.emptied()
                group.add(batch, first_row)
                if group.is_due:
                    yield from group.emptied()
        except Exception:
            if group.batches:
                yield from group.emptied()
            raise

    def _batches(self, start: int) -> Iterator[tuple[tuple[Any, ...], int]]:
        """The batches from row ``start`` on, for ever, each with the number of its first row in the epoch."""
        skipped = start
        with _drawing_apart(self.source, self.seed):
            while True:
                given = 0
                for batch in self._epoch():
                    count = _length(batch)
                    kept = max(0, count - skipped)
                    if kept:
                        last = (v[len(v) - kept :] if hasattr(v, "shape") and v.shape else v for v in batch)
                        yield tuple(last), given + count - kept
                    given, skipped = given + count, skipped - (count - kept)
                if not given:
                    raise ValueError("the source gave no batch in an epoch: give one that can be begun again")

    def once(self) -> Iterator[tuple[Any, ...]]:
        """The batches of one epoch."""
        given = 0
        with _drawing_apart(self.source, self.seed):
            for batch in self._epoch():
                yield self.convert(batch, given)
                given += _length(batch)

    def _epoch(self) -> Iterator[tuple[Any, ...]]:
        for batch in self.source() if callable(self.source) else self.source:
            if isinstance(batch, dict):
                raise ValueError(
                    f"a batch is a dict of {sorted(batch)}: give tuples in the order of the model's arguments, such as "
                    "(x, y)"
                )
            yield tuple(batch) if isinstance(batch, tuple | list) else (batch,)


class _RowBuffer:
    """Batches in a row that are made tensors together, which costs about as much as for one."""

    def __init__(self, convert: Convert) -> None:
        self._convert = convert
        self._begun, self._bytes = time.perf_counter(), _GROUP_BYTES  # the first batch goes alone
        self._first_row = self._next_row = 0
        self.batches: list[tuple[Any, ...]] = []

    def takes(self, batch: tuple[Any, ...], first_row: int) -> bool:
        """Return True if a batch can be joined to those that are here."""
        if not self.batches:
            return True
        before = self.batches[-1]
        alike = len(batch) == len(before) and all(map(_is_like, batch, before))
        return alike and first_row == self._next_row

    def add(self, batch: tuple[Any, ...], first_row: int) -> None:
        """Take a copy, as the source may fill the same memory again."""
        if not self.batches:
            self._first_row = first_row
        self._next_row = first_row + _length(batch)
        self.batches.append(tuple(_copied(value) for value in batch))
        self._bytes += sum(value.nbytes for value in batch if _is_plain(value))

    @property
    def is_due(self) -> bool:
        """Return True if the batches should be handed on now."""
        waited = time.perf_counter() - self._begun
        simple = all(_is_plain(value) or isinstance(value, _SETTINGS) for value in self.batches[0])
        return self._bytes >= _GROUP_BYTES or waited > _GROUP_SECONDS or not simple

    def emptied(self) -> Iterator[tuple[Any, ...]]:
        """All that is here as one batch of tensors; after it the group is empty, and begins to wait."""
        joined = tuple(_joined(parts) for parts in zip(*self.batches, strict=True))
        self.batches, self._bytes = [], 0
        yield self._convert(joined, self._first_row)
        self._begun = time.perf_counter()


def _is_plain(value: Any) -> bool:
    if type(value) is np.ndarray:
        return value.dtype.kind in "biuf" and value.ndim > 0
    strided = type(value) is Tensor and value.layout == torch.strided and not value.is_nested
    return strided and not value.is_quantized and value.dim() > 0


def _is_like(value: Any, other: Any) -> bool:
    """Return True if two values of an argument can be joined by rows, or are the same setting."""
    if _is_plain(value) and type(value) is type(other):
        return value.dtype == other.dtype and value.shape[1:] == other.shape[1:]
    return isinstance(value, _SETTINGS) and type(value) is type(other) and value == other


def _copied(value: Any) -> Any:
    if not _is_plain(value):
        return value
    return value.copy() if isinstance(value, np.ndarray) else value.clone()


def _joined(parts: tuple[Any, ...]) -> Any:
    if len(parts) == 1 or not _is_plain(parts[0]):
        return parts[0]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(parts)


def rows_in(source: Any, given: int | None) -> int:
    """The rows of an epoch: those ``given``, or else those that a DataLoader knows of.

    Raises
    ------
    ValueError
        If nobody knows, or the source can be read only once.
    """
    if isinstance(source, Iterator):
        raise ValueError(
            "an iterator can be read only once, and a fit begins its rows again each epoch: give what it is made from, "
            "or a function that returns it"
        )
    if given is not None:
        return given
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
        return len(source.sampler)  # type: ignore[arg-type]
    raise ValueError(
        "how many rows the batches come from is not known, and the scale of a mini-batch needs it: pass num_data="
    )


@contextmanager
def _drawing_apart(source: Any, seed: int) -> Iterator[None]:
    """Let a DataLoader that has no generator draw from one of ``seed``, not from the process's."""
    parts: list[Any] = [source, source.sampler] if isinstance(source, DataLoader) else []
    drawing = [part for part in parts if getattr(part, "generator", False) is None]
    generator = torch.Generator().manual_seed(seed)
    for part in drawing:
        part.generator = generator
    try:
        yield
    finally:
        for part in drawing:
            part.generator = None


def _length(batch: tuple[Any, ...]) -> int:
    sizes = [len(value) for value in batch if hasattr(value, "shape") and value.shape]
    if len(set(sizes)) != 1:
        raise ValueError(f"a batch has arrays of {sizes or 'no'} rows: give as many of each, such as (x, y)")
    return int(sizes[0])
