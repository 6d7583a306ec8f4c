"""Ctrl-C and SIGTERM as a wish to end soon, so that a fit can end whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

__all__ = ["StopSignal", "interruptible"]

_USUAL: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_WORDS = b"\nending after these steps; a second signal ends it at once\n"


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
