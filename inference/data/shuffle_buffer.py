"""Rows that lie on disk in blocks, in an order that is random enough and cheap to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Blocks", "Convert", "ShuffleBuffer"]

Convert = Callable[[tuple[Any, ...], int], tuple[Any, ...]]
BUFFER_BYTES = 2**24
RUN_BYTES = 2**16


@dataclass(frozen=True)
class Blocks:
    """Rows in blocks that are read as a whole: ``sizes`` in rows, ``read(i)`` gives block i of each argument."""

    sizes: np.ndarray
    read: Callable[[int], tuple[Any, ...]]
    row_bytes: int

    @property
    def rows(self) -> int:
        """All rows."""
        return int(self.sizes.sum())

    @cached_property
    def begins(self) -> np.ndarray:
        """The number of each block's first row."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]])


@dataclass(frozen=True)
class ShuffleBuffer:
    """All rows once an epoch: blocks in a random order, their rows mixed within pools of some 16 MiB of blocks.

    Reading costs the same for a row however many there are, and a pool has
    blocks from all over the data. The order depends on ``seed`` alone, and is
    that of the blocks where ``shuffle`` is False.
    """

    blocks: Blocks
    convert: Convert
    shuffle: bool
    seed: int

    @property
    def num_data(self) -> int:
        """N, all rows."""
        return self.blocks.rows

    def once(self) -> Iterator[tuple[Any, ...]]:
        """The blocks in the order in which they lie."""
        for i, begin in enumerate(self.blocks.begins):
            yield self.convert(self.blocks.read(i), int(begin))

    def rows(self, start: int) -> Iterator[tuple[Any, ...]]:
        """The rows from number ``start`` of this order on, pool by pool, for ever."""
        epoch, skipped = divmod(start, self.blocks.rows)
        most = max(1, BUFFER_BYTES // self.blocks.row_bytes)
        while True:
            order = np.arange(len(self.blocks.sizes))
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(order)
            sizes = self.blocks.sizes[order]
            ends = np.cumsum(sizes)
            begin = 0
            while begin < len(order):
                before = int(ends[begin] - sizes[begin])
                end = max(begin + 1, int(np.searchsorted(ends, before + most, side="right")))
                if ends[end - 1] > skipped:
                    yield self._pool(order[begin:end], (epoch, begin), max(0, skipped - before))
                begin = end
            epoch, skipped = epoch + 1, 0

    def _pool(self, numbers: np.ndarray, key: tuple[int, int], skipped: int) -> tuple[Any, ...]:
        whole: Sequence[Any] = self._read(numbers)
        if self.shuffle:
            count = int(self.blocks.sizes[numbers].sum())
            places = np.random.default_rng([self.seed, *key]).permutation(count)
            whole = [_taken(value, places) if isinstance(value, Tensor) else value for value in whole]
        return tuple(value[skipped:] if isinstance(value, Tensor) else value for value in whole)

    def _read(self, numbers: np.ndarray) -> tuple[Any, ...]:
        """Some blocks, converted together; one by one where that fails, so that the row at fault is known."""
        raw = [self.blocks.read(int(i)) for i in numbers]
        try:
            return self.convert(tuple(map(_joined, zip(*raw, strict=True))), 0)
        except ValueError:
            for i, block in zip(numbers, raw, strict=True):
                self.convert(block, int(self.blocks.begins[i]))
            raise


def _joined(parts: tuple[Any, ...]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else parts[0]


def _taken(rows: Tensor, places: np.ndarray) -> Tensor:
    """``rows[places]``, by NumPy, which takes narrow rows several times as fast as torch."""
    out = torch.empty_like(rows)
    np.take(rows.numpy(), places, 0, out=out.numpy(), mode="clip")
    return out
