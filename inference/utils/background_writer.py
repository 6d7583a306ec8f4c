"""Work that a fit need not wait for: one thread, a short queue, no error lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Queue
from threading import Thread
from typing import Generic, TypeVar

__all__ = ["BackgroundWriter", "Gathered"]

T = TypeVar("T")

_SECONDS = 1.0
_PATIENCE = 0.005


class BackgroundWriter:
    """A thread that does one job after the other until it is closed, with at most ``most`` of them waiting.

    The first error ends the work; it is raised by the next :meth:`put`, or by
    :meth:`close`.

    >>> done = []
    >>> work = BackgroundWriter("count")
    >>> for number in range(10):
    ...     work.put(lambda number=number: done.append(number))
    >>> work.close()
    >>> done == list(range(10))
    True
    """

    def __init__(self, name: str, most: int = 4) -> None:
        self._jobs: Queue[Callable[[], object] | None] = Queue(most)
        self._error: Exception | None = None
        self._thread = Thread(target=self._work, name=f"kiln-{name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], object]) -> None:
        """Have ``job`` done; waits while too many others do."""
        self._raise()
        self._jobs.put(job)

    def close(self, quietly: bool = False) -> None:
        """Wait for all jobs and end the thread; ``quietly`` leaves an error to the one already on its way."""
        self._jobs.put(None)
        self._thread.join()
        if not quietly:
            self._raise()

    def _next(self) -> Callable[[], object] | None:
        """The next job, a while after it was given: its giver has more Python to run before the next steps."""
        rested = self._jobs.empty()
        job = self._jobs.get()
        if rested and job is not None:
            time.sleep(_PATIENCE)
        return job

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        failed = False
        while (job := self._next()) is not None:
            if failed:
                continue
            try:
                job()
            except Exception as error:
                self._error, failed = error, True


class Gathered(Generic[T]):
    """Items that a thread writes, all of a second together, so that adding one costs next to nothing."""

    def __init__(self, name: str, write: Callable[[Sequence[T]], object]) -> None:
        self._write = write
        self._items: list[T] = []
        self._sent = time.perf_counter()
        self._work = BackgroundWriter(name)

    def add(self, item: T) -> None:
        """Have ``item`` written within a second, or with the next one after it."""
        self._items.append(item)
        if time.perf_counter() - self._sent > _SECONDS:
            self._send()

    def close(self, quietly: bool = False) -> None:
        """Write what is left and end the thread; ``quietly`` as :meth:`BackgroundWriter.close`."""
        try:
            self._send()
        finally:
            self._work.close(quietly)

    def _send(self) -> None:
        items, self._items, self._sent = self._items, [], time.perf_counter()
        self._work.put(partial(self._write, items))
