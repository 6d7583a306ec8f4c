"""The batches of a fit's steps, read ahead of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from inference.data.arguments import as_tensors
from inference.data.batched_dataset import BatchedDataset
from inference.data.shuffle_buffer import ShuffleBuffer
from inference.utils.random_state import RandomStream

__all__ = ["BatchLoader", "Prefetcher"]

_HELD_BYTES = 2**24  # of batches that are held for the steps at hand, and again of those that are read ahead
_MOST = 10_000

T = TypeVar("T")
Slab = tuple[Any, ...]  # of each argument K batches, (K, B, …); what is no tensor as it is


class BatchLoader:
    """One batch a step, of B rows each; that of a step is always the same.

    ``first`` are the rows of step 0. Before steps are taken :meth:`hold` has
    their batches read; at most ``most`` can be held at once.
    """

    def __init__(
        self,
        declared: BatchedDataset,
        names: list[str],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int | None,
        seed: int,
    ) -> None:
        self._device = device
        self._source = declared.opened(names, dtype, seed)
        if batch_size is not None:
            batch_size = min(batch_size, self.num_data)
        elif isinstance(self._source, ShuffleBuffer):
            raise ValueError(f"{self.num_data:,} rows are to be read in batches, of an unknown size: pass batch_size=")
        self._own = RandomStream.seeded(seed)
        before = self._own.mark()
        self._slabs = self._from(0, batch_size)
        first = self._read()
        self._ahead = self._own.mark() == before
        self.batch_size = len(next(value for value in first if isinstance(value, Tensor))[0])
        rows = [value[0] if isinstance(value, Tensor) else value for value in first]
        self.first = as_tensors(rows, names[: len(rows)], device, dtype)
        batch = sum(value[0].nbytes for value in first if isinstance(value, Tensor))
        self.most = min(_MOST, max(1, _HELD_BYTES // max(1, batch)))
        self._held, self._begin, self._end = [first], 0, _rows(first)
        self._read_ahead()

    @property
    def num_data(self) -> int:
        """N, all rows."""
        return self._source.num_data

    def hold(self, step: int, count: int) -> None:
        """Have the batches of ``count`` steps from ``step`` on at hand, and let go of those before.

        Raises
        ------
        ValueError, OSError
            If rows cannot be read, or are no finite numbers.
        """
        if not self._begin <= step <= self._end:
            self.close()
            self._slabs = self._from(step * self.batch_size, self.batch_size)
            self._held, self._begin, self._end = [], step, step
            self._read_ahead()
        while self._held and self._begin + _rows(self._held[0]) <= step:
            self._begin += _rows(self._held.pop(0))
        while self._end < step + count:
            self._held.append(self._read())
            self._end += _rows(self._held[-1])

    def rows(self, step: int, count: int) -> list[Tensor]:
        """Of each argument that is a tensor, the batches of ``count`` steps that are held, (count, B, …)."""
        parts, place = [], self._begin
        for slab in self._held:
            begin, end = max(0, step - place), min(_rows(slab), step + count - place)
            if begin < end:
                parts.append([value[begin:end] for value in slab if isinstance(value, Tensor)])
            place += _rows(slab)
        joined = parts[0] if len(parts) == 1 else [torch.cat(same) for same in zip(*parts, strict=True)]
        return [value.to(self._device) for value in joined]

    def args(self, step: int) -> tuple[Any, ...]:
        """The arguments of the model at a step that is held."""
        rows = iter(self.rows(step, 1))
        return tuple(next(rows)[0] if isinstance(value, Tensor) else value for value in self.first)

    def once(self) -> Iterator[tuple[Any, ...]]:
        """All rows once, in pieces of any size, in the order in which they come."""
        for piece in self._source.once():
            yield tuple(value.to(self._device) if isinstance(value, Tensor) else value for value in piece)

    def close(self) -> None:
        """End the reading ahead."""
        if isinstance(self._slabs, Prefetcher):
            self._slabs.close()

    def _from(self, row: int, size: int | None) -> Iterator[Slab]:
        return _slabs(self._source.rows(row), size)

    def _read_ahead(self) -> None:
        if self._ahead:
            self._slabs = Prefetcher(self._slabs, self.most, _rows)

    def _read(self) -> Slab:
        """The next batches; those of an iterator that uses the process's random numbers at numbers of its own."""
        if isinstance(self._slabs, Prefetcher):
            return next(self._slabs)
        with self._own.active():
            return next(self._slabs)


def _slabs(pieces: Iterator[tuple[Any, ...]], size: int | None) -> Iterator[Slab]:
    """Pieces of any length as batches of ``size`` rows, or of as many as the first piece has; no row is left out."""
    rest: tuple[Any, ...] | None = None
    for given in pieces:
        piece = given
        size = size or _rows(piece)
        if rest is not None:
            missing = size - _rows(rest)
            pairs = zip(rest, _cut(piece, 0, missing), strict=True)
            rest = tuple(torch.cat([a, b]) if isinstance(a, Tensor) else a for a, b in pairs)
            piece = _cut(piece, missing, None)
            if _rows(rest) < size:
                continue
            yield _stacked(rest, size)
        whole = _rows(piece) // size * size
        if whole:
            yield _stacked(_cut(piece, 0, whole), size)
        rest = _cut(piece, whole, None) if _rows(piece) > whole else None


def _rows(piece: tuple[Any, ...]) -> int:
    return len(next(value for value in piece if isinstance(value, Tensor)))


def _cut(piece: tuple[Any, ...], begin: int, end: int | None) -> tuple[Any, ...]:
    return tuple(value[begin:end] if isinstance(value, Tensor) else value for value in piece)


def _stacked(piece: tuple[Any, ...], size: int) -> Slab:
    return tuple(value.unflatten(0, (-1, size)) if isinstance(value, Tensor) else value for value in piece)


class Prefetcher(Generic[T]):
    """The items of ``items``, read before they are asked for, until together they have the ``size`` of ``most``.

    An error of the iterator is raised where its item would have been.

    >>> numbers = Prefetcher(iter(range(5)), most=2, size=lambda number: 1)
    >>> list(numbers)
    [0, 1, 2, 3, 4]
    >>> numbers.close()
    """

    def __init__(self, items: Iterator[T], most: int, size: Callable[[T], int]) -> None:
        self._items, self._most, self._size = items, most, size
        self._read: deque[T] = deque()
        self._held = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._work, name="kiln-read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item; waits until it has been read."""
        with self._changed:
            self._changed.wait_for(lambda: self._read or self._error)
            if not self._read and self._error is not None:
                raise self._error
            item = self._read.popleft()
            self._held -= self._size(item)
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """End the thread, after the item that it is reading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._fail(StopIteration())
        except BaseException as error:  # whatever it is, the one who waits has to hear of it
            self._fail(error)
        finally:
            getattr(self._items, "close", lambda: None)()

    def _put(self, item: T) -> bool:
        """Append an item, wait for room, and return True unless closed."""
        with self._changed:
            self._read.append(item)
            self._held += self._size(item)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._held < self._most or self._closed)
            return not self._closed

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
