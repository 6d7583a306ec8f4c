"""Work that a fit need not wait for: one thread, a short queue, no error lost."""

from __future__ import annotations

from collections.abc import Callable
from queue import Queue
from threading import Thread

__all__ = ["Background"]

_WAITING = 4  # jobs hold copies of the parameters


class Background:
    """A thread that does one job after the other until it is closed.

    The first error ends the work; it is raised by the next :meth:`put`, or by
    :meth:`close`.

    >>> done = []
    >>> work = Background("count")
    >>> for number in range(10):
    ...     work.put(lambda number=number: done.append(number))
    >>> work.close()
    >>> done == list(range(10))
    True
    """

    def __init__(self, name: str) -> None:
        self._jobs: Queue[Callable[[], object] | None] = Queue(_WAITING)
        self._error: Exception | None = None
        self._thread = Thread(target=self._work, name=f"kiln-{name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], object]) -> None:
        """Have ``job`` done; waits while four others are waiting."""
        self._raise()
        self._jobs.put(job)

    def close(self, quietly: bool = False) -> None:
        """Wait for all jobs and end the thread; ``quietly`` leaves an error to the one already on its way."""
        self._jobs.put(None)
        self._thread.join()
        if not quietly:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        failed = False
        while (job := self._jobs.get()) is not None:
            if failed:
                continue
            try:
                job()
            except Exception as error:
                self._error, failed = error, True
