"""An iterator that is read by a thread of its own, ahead of whoever takes its items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition, Thread
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")


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
        """Whether more is wanted, once it is."""
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
