"""Rows from anything that can be iterated: torch's DataLoader, a list of batches, a function that makes an iterator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from inference.pools import Convert

__all__ = ["Loader", "rows_in"]


@dataclass(frozen=True)
class Loader:
    """The batches of ``source``, again and again; ``num_data`` are the rows of them all."""

    source: Any
    num_data: int
    convert: Convert
    seed: int

    def rows(self, start: int) -> Iterator[tuple[Any, ...]]:
        """The rows from number ``start`` on, batch by batch, for ever."""
        skipped = start
        with _drawing_apart(self.source, self.seed):
            while True:
                given = 0
                for batch in self._epoch():
                    count = _length(batch)
                    kept = max(0, count - skipped)
                    if kept:
                        yield self.convert(_last(batch, kept), given + count - kept)
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


def _last(batch: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    return tuple(value[len(value) - count :] if hasattr(value, "shape") and value.shape else value for value in batch)
