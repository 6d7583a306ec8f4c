"""An iterator that is read by a thread of its own, ahead of whoever takes its items."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

__all__ = ["ReadAhead"]

T = TypeVar("T")

_LOOK = 0.1  # seconds between two looks whether anybody still wants items


class ReadAhead(Generic[T]):
    """The items of ``items``, up to ``most`` of which are read before they are asked for.

    An error of the iterator is raised where its item would have been.

    >>> numbers = ReadAhead(iter(range(5)), most=2)
    >>> list(numbers)
    [0, 1, 2, 3, 4]
    >>> numbers.close()
    """

    def __init__(self, items: Iterator[T], most: int) -> None:
        self._items = items
        self._queue: Queue[tuple[T | None, BaseException | None]] = Queue(most)
        self._closed = Event()
        self._thread = Thread(target=self._work, name="kiln-read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item; waits until it has been read."""
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread, after the item that it is reading."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=_LOOK)
            except Empty:
                continue
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # whatever it is, the one who waits has to hear of it
            self._put((None, error))
        finally:
            getattr(self._items, "close", lambda: None)()

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=_LOOK)
            except Full:
                continue
            return True
        return False
