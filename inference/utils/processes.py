"""Processes that share work by joblib, and the signals that ask one to end soon, so that a fit can end whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from joblib import Parallel, delayed
from joblib.parallel import get_active_backend

__all__ = ["StopSignal", "interruptible", "jobs_at_once", "spread"]

T = TypeVar("T")
_USUAL: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_WORDS = b"\nending after these steps; a second signal ends it at once\n"


def jobs_at_once(n_jobs: int | None) -> int:
    """Return the number of processes for ``n_jobs``; None takes ``joblib.parallel_config``'s, or one.

    Raises
    ------
    ValueError
        If joblib is set to run threads.
    """
    backend, configured = get_active_backend()
    count = int(backend.effective_n_jobs(configured if n_jobs is None else n_jobs))
    if getattr(backend, "uses_threads", False) and count > 1:
        raise ValueError("joblib is set to run threads, which share torch's random numbers: use processes, or n_jobs=1")
    return count


def spread(run: Callable[[Any], T], items: Sequence[Any], n_jobs: int | None) -> Iterable[T]:
    """``run`` of each of ``items``, as they are done, in the processes of joblib's backend."""
    jobs_at_once(n_jobs)
    backend, _ = get_active_backend()
    order = "generator_unordered" if getattr(backend, "supports_return_generator", False) else "list"
    found: Iterable[T] = Parallel(n_jobs=n_jobs, return_as=order)(delayed(run)(item) for item in items)
    return found


@dataclass
class StopSignal:
    """The name of the signal that asked for an end, None as long as there was none."""

    signal: str | None = None


@contextmanager
def interruptible() -> Iterator[StopSignal]:
    """Inside the block the first SIGINT or SIGTERM is noted; a second one does what it did outside.

    Signals that the program handles or ignores itself are left alone, and so are
    all of them outside of the main thread, where Python hears none.

    >>> import os, signal
    >>> with interruptible() as stop_signal:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     stop_signal.signal
    'SIGTERM'
    """
    stop_signal = StopSignal()
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number, usual in _USUAL.items() if main and signal.getsignal(number) is usual]

    def note(number: int, frame: FrameType | None) -> None:
        stop_signal.signal = signal.Signals(number).name
        _give_back(ours)
        with suppress(OSError, ValueError):  # not print: the stream may be in the middle of a line of the progress bar
            os.write(sys.stderr.fileno(), _WORDS)

    for number in ours:
        signal.signal(number, note)
    try:
        yield stop_signal
    finally:
        if stop_signal.signal is None:
            _give_back(ours)


def _give_back(numbers: list[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, _USUAL[number])
