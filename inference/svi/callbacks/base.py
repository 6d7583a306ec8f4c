"""Callbacks of a fit: their protocol, the progress that they receive, and when they are called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from inference.engine.engine import IterateRecorder
from inference.model.parameters import Params
from inference.posterior import Posterior
from inference.utils.validation import positive_integer

__all__ = ["CHUNK", "Callback", "CallbackRunner", "Every", "Progress", "as_callbacks", "every", "opened", "settled"]

CHUNK = 100


@dataclass(frozen=True)
class Progress:
    """State of a fit between two chunks of steps, as callbacks receive it.

    Attributes
    ----------
    step, steps
        Number of steps taken, and to take.
    curves
        −ELBO in nats, and KL(q ‖ p(z)), of the n steps since this callback was
        called last, (2, n).
    seconds
        Time since the first step.
    flat_params
        θ, all unconstrained parameters in one vector, (P,).
    start, starts
        Number of the restart, from 1, and how many the fit has.
    layout
        Names, shapes and constraints of the parts of θ.
    """

    step: int
    steps: int
    curves: Tensor
    seconds: float
    flat_params: Tensor
    make_posterior: Callable[[], Posterior] = field(repr=False)
    layout: Params = field(repr=False)
    start: int = 1
    starts: int = 1

    @property
    def losses(self) -> Tensor:
        """−ELBO in nats of the steps since this callback was called last, (n,)."""
        return self.curves[0]

    @property
    def kl(self) -> Tensor:
        """KL(q ‖ p(z)) in nats of those steps, (n,); NaN where the fit has none."""
        return self.curves[1]

    @cached_property
    def means(self) -> tuple[float, float]:
        """Means of ``losses`` and of ``kl``."""
        loss, kl = self.curves.sum(1).tolist()
        return loss / self.curves.shape[1], kl / self.curves.shape[1]

    @property
    def elbo(self) -> float:
        """Mean ELBO in nats of the steps since this callback was called last."""
        return -self.means[0]

    @property
    def posterior(self) -> Posterior:
        """Posterior after these steps, with all methods of the one that ``fit`` returns."""
        return self.make_posterior()

    @property
    def params(self) -> dict[str, Tensor]:
        """Parameters by name, in the user's space."""
        return self.posterior.params


class Callback(Protocol):
    """Function or object that is called with a :class:`Progress` while a fit runs.

    It may also be a context manager, and have any of the attributes of
    :class:`Periodic`, :class:`Observer` and :class:`Resumable`.
    """

    def __call__(self, progress: Progress, /) -> object:
        """Look at the fit, or change something outside that the model reads."""


@runtime_checkable
class Periodic(Protocol):
    """Callback with a number of steps of its own between two calls."""

    @property
    def every(self) -> int:
        """Number of steps between two calls, in place of 100."""


@runtime_checkable
class Observer(Protocol):
    """Callback that says whether it changes anything."""

    @property
    def only_looks(self) -> bool:
        """True if it changes nothing that the model reads, so that compiled steps need not stop for it."""


@runtime_checkable
class Resumable(Protocol):
    """Callback that keeps what it wrote for the steps before a fit was resumed."""

    def resume(self, restart: int, step: int) -> None:
        """Prepare to continue after ``step`` of this restart, from 1; called before the callback is entered."""


@dataclass(frozen=True)
class Every:
    """Callback with the number of steps between two calls; see :func:`every`."""

    every: int
    callback: Callback

    @property
    def only_looks(self) -> bool:
        """True if the callback changes nothing that the model reads."""
        return _only_looks(self.callback)

    def __call__(self, progress: Progress) -> None:
        """Pass ``progress`` on."""
        self.callback(progress)


def every(steps: int, callback: Callback) -> Every:
    """Return ``callback`` as one that is called after each ``steps`` steps and at the end, in place of each 100.

    >>> import torch
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x, seen = torch.linspace(-1, 1, 20).reshape(-1, 1), []
    >>> look = kiln.every(20, lambda now: seen.append((now.step, len(now.losses))))
    >>> guide = mean_field_normal(linear_regression)
    >>> _ = kiln.fit(linear_regression, guide, x, x[:, 0], steps=50, callbacks=[look], progress=False)
    >>> seen
    [(20, 20), (40, 20), (50, 10)]
    """
    return Every(positive_integer(steps, "steps"), callback)


def as_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Return the callbacks of a list or another iterable.

    Raises
    ------
    ValueError
        If it is something else, or holds what cannot be called.
    """
    if callable(callbacks) or isinstance(callbacks, str | bytes | Mapping):
        raise ValueError(f"callbacks is {callbacks!r}: pass a list of functions, callbacks=[…]")
    try:
        found = tuple(callbacks)
    except TypeError as error:
        raise ValueError(f"callbacks is {callbacks!r}: pass a list of functions, callbacks=[…]") from error
    wrong = [one for one in found if not callable(one)]
    if wrong:
        raise ValueError(f"callbacks holds {wrong[0]!r}: give functions that take a Progress")
    return found


@contextmanager
def opened(callbacks: Sequence[Callback], resumed: tuple[int, int] | None = None) -> Iterator[None]:
    """Enter the callbacks that are context managers, and leave them when the block ends, also with an error.

    ``resumed`` is the restart, from 1, and the step after which the fit is
    resumed, which :class:`Resumable` callbacks receive before they are entered.
    """
    with ExitStack() as stack:
        inner = {id(one): one for one in (_inner(callback) for callback in callbacks)}
        for callback in inner.values():
            if resumed is not None and isinstance(callback, Resumable):
                callback.resume(*resumed)
            if isinstance(callback, AbstractContextManager):
                stack.enter_context(callback)
        yield


def _inner(callback: Callback) -> Callback:
    return _inner(callback.callback) if isinstance(callback, Every) else callback


def _only_looks(callback: Callback) -> bool:
    return isinstance(callback, Observer) and callback.only_looks


def settled(losses: Tensor) -> float:
    """Return the mean of the losses, (steps,), over the last tenth of the steps: −ELBO in nats at the end of a fit."""
    return losses[-max(1, len(losses) // 10) :].mean().item()


@dataclass
class _Scheduled:
    """Callback with the number of steps between two calls, and the step of the last call."""

    callback: Callback
    every: int
    last_step: int = 0


class CallbackRunner:
    """Callbacks of one restart of a fit, the steps at which each is due, and the losses so far.

    ``make_posterior`` is called with θ, the curves so far, (2, steps), and the
    seconds; ``restart`` is the number of this restart, from 1, and how many there are.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        steps: int,
        layout: Params,
        make_posterior: Callable[[Tensor, Tensor, float], Posterior],
        restart: tuple[int, int] = (1, 1),
    ) -> None:
        self._scheduled = [
            _Scheduled(callback, callback.every if isinstance(callback, Periodic) else CHUNK) for callback in callbacks
        ]
        self.steps = steps
        self._layout = layout
        self._make_posterior = make_posterior
        self._restart = restart
        self._buffer: Tensor | None = None
        self._taken = 0
        self._begin = time.perf_counter()
        self.may_change = not all(map(_only_looks, callbacks))

    @property
    def curves(self) -> Tensor:
        """Losses and KL of all steps so far, (2, steps); a view, for reading only."""
        return torch.empty(2, 0) if self._buffer is None else self._buffer[:, : self._taken]

    def resume(self, curves: Tensor, seconds: float) -> None:
        """Continue after the steps with these losses and KL, (2, n), which took ``seconds``."""
        self._buffer = curves.new_empty(2, self.steps)
        self._taken = curves.shape[1]
        self._buffer[:, : self._taken] = curves
        self._begin -= seconds
        for one in self._scheduled:
            one.last_step = self._taken if self._taken == self.steps else self._taken - self._taken % one.every

    @property
    def seconds(self) -> float:
        """Time since the first step."""
        return time.perf_counter() - self._begin

    def until(self, step: int) -> int:
        """Return the next step at which a callback is due, or else the last step."""
        return min([self.steps, *(step + one.every - step % one.every for one in self._scheduled)])

    def tell(self, chunk: Tensor, iterates: IterateRecorder) -> bool:
        """Record the losses and KL of the next steps, (n, 2), and call the callbacks that are due.

        Return True if there were any.
        """
        if self._buffer is None:
            self._buffer = chunk.new_empty(2, self.steps)
        self._buffer[:, self._taken : self._taken + len(chunk)] = chunk.T
        self._taken += len(chunk)
        called = [self._call_due(*iterate) for iterate in iterates.kept]
        return any(called)

    def _call_due(self, step: int, clock: float, flat_params: Tensor) -> bool:
        """Call the callbacks that are due at ``step``, which was reached at ``clock`` with this θ."""
        due = [one for one in self._scheduled if step % one.every == 0 or step == self.steps]
        if not due:
            return False
        seconds, curves = clock - self._begin, self.curves[:, :step]
        posterior = cache(lambda: self._make_posterior(flat_params, curves, seconds))
        shared: dict[int, Progress] = {}  # by the step of the last call
        for one in due:
            if one.last_step not in shared:
                new = curves[:, one.last_step :].clone()
                shared[one.last_step] = Progress(
                    step, self.steps, new, seconds, flat_params, posterior, self._layout, *self._restart
                )
            one.callback(shared[one.last_step])
            one.last_step = step
        return True
