"""Random numbers and defaults of one fit, apart from the state of the process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch

__all__ = ["RandomStream", "environment"]


@dataclass
class RandomStream:
    """The random state of one fit or one call, kept apart from everybody else's.

    Inside ``with stream.active():`` torch, NumPy and :mod:`random` go on where
    the stream stood; on leaving, the stream remembers where it got to and the
    process gets back the state it had.

    >>> stream = RandomStream.seeded(0)
    >>> before = torch.get_rng_state()
    >>> with stream.active():
    ...     first = torch.rand(())
    >>> with stream.active():
    ...     second = torch.rand(())
    >>> bool(first == second), torch.equal(before, torch.get_rng_state())
    (False, True)
    """

    state: dict[str, Any]

    @classmethod
    def seeded(cls, seed: int, branch: int = 0) -> RandomStream:
        """A stream that starts at ``seed``; each further ``branch`` of a seed is a stream of its own."""
        outside = _capture()
        try:
            pyro.set_rng_seed(int(np.random.SeedSequence([seed, branch]).generate_state(1)[0]) if branch else seed)
            return cls(_capture())
        finally:
            _restore(outside)

    @classmethod
    def current(cls) -> RandomStream:
        """Return a copy of the random state of the process."""
        return cls(_capture())

    def make_current(self) -> None:
        """Make this the random state of the process."""
        _restore(self.state)

    def mark(self) -> tuple[Any, ...]:
        """Return a key that two streams share if they draw the same numbers from here on."""
        name, keys, *rest = self.state["numpy"]
        return self.state["torch"].numpy().tobytes(), name, keys.tobytes(), *rest, self.state["python"]

    def saved(self) -> dict[str, Any]:
        """The state as tensors, numbers and words, for :meth:`restored`."""
        name, keys, *rest = self.state["numpy"]
        version, numbers, gauss = self.state["python"]
        return {
            "torch": self.state["torch"],
            "cuda": self.state["cuda"],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            "python": [version, torch.tensor(numbers), gauss],
        }

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> RandomStream:
        """The stream that goes on where the saved one stood.

        Raises
        ------
        ValueError, RuntimeError, TypeError
            If one of the generators does not take its state.
        """
        name, keys, place, *rest = saved["numpy"]
        if not 0 <= place <= len(keys):  # NumPy would read beyond them
            raise ValueError(f"the state of NumPy's generator is at {place!r} of {len(keys)} numbers")
        version, numbers, gauss = saved["python"]
        numpy = (name, keys.numpy().astype(np.uint32), place, *rest)
        python = (version, tuple(numbers.tolist()), gauss)
        found = {"torch": saved["torch"], "cuda": saved["cuda"], "numpy": numpy, "python": python}
        outside = _capture()
        try:
            _restore(found)
        finally:
            _restore(outside)
        return cls(found)

    def active(self) -> AbstractContextManager[None]:
        """Draw from this stream until the block ends."""
        return self._in_place(_capture, _restore)

    def drawing(self) -> AbstractContextManager[None]:
        """As :meth:`active`, forty times as quick, for code that draws by torch alone."""
        return self._in_place(_capture_torch, _restore_torch)

    @contextmanager
    def _in_place(
        self, capture: Callable[[], dict[str, Any]], restore: Callable[[dict[str, Any]], None]
    ) -> Iterator[None]:
        """Put this stream in the place of those generators of the process that the two functions are of."""
        outside = capture()
        restore(self.state)
        try:
            yield
        finally:
            self.state = {**self.state, **capture()}
            restore(outside)


def _capture() -> dict[str, Any]:
    return {
        **_capture_torch(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - a model may use it
        "python": random.getstate(),
    }


def _restore(state: dict[str, Any]) -> None:
    _restore_torch(state)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


def _capture_torch() -> dict[str, Any]:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if cuda else None}


def _restore_torch(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def environment(device: torch.device, dtype: torch.dtype, validate: bool | None = None) -> Iterator[None]:
    """Run with this default device, float type and Pyro validation, if said; restore them after."""
    outside = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, outside)
        torch.set_default_dtype(dtype)
        if validate is not None:
            stack.enter_context(pyro.validation_enabled(validate))
        if device.type != "cpu":
            stack.enter_context(device)
        yield
