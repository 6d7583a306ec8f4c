"""Watching a fit: what a callback is told, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

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
    """What a callback is told between chunks of steps.

    Attributes
    ----------
    step, steps
        Steps taken, and to take.
    curves
        −ELBO in nats, and KL(q ‖ p(z)), of the n steps since this callback was
        called last, (2, n).
    seconds
        Since the first step.
    flat
        θ, all unconstrained parameters in one vector, (P,).
    start, starts
        Which of the fit's restarts this is, from 1, and how many there are.
    layout
        Names, shapes and constraints of the parts of θ.
    """

    step: int
    steps: int
    curves: Tensor
    seconds: float
    flat_params: Tensor
    made: Callable[[], Posterior] = field(repr=False)
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
        """The means of ``losses`` and of ``kl``."""
        loss, kl = self.curves.sum(1).tolist()
        return loss / self.curves.shape[1], kl / self.curves.shape[1]

    @property
    def elbo(self) -> float:
        """The mean ELBO of the steps since this callback was called last, in nats."""
        return -self.means[0]

    @property
    def posterior(self) -> Posterior:
        """The posterior as it is now, which can be asked all that the fitted one can."""
        return self.made()

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name, in the user's space."""
        return self.posterior.params


Callback = Callable[[Progress], Any]


@dataclass(frozen=True)
class Every:
    """A callback with the number of steps between two calls; see :func:`every`."""

    every: int
    callback: Callback

    @property
    def only_looks(self) -> bool:
        """Whether the callback promises to change nothing that the model reads."""
        return getattr(self.callback, "only_looks", False)

    def __call__(self, progress: Progress) -> None:
        """Hand ``progress`` on."""
        self.callback(progress)


def every(steps: int, callback: Callback) -> Every:
    """``callback``, called after each ``steps`` steps and at the end, in place of each 100.

    >>> import torch
    >>> from guides import mean_field_normal
    >>> from inference import every, fit
    >>> from ppl_models import linear_regression
    >>> x, seen = torch.linspace(-1, 1, 20).reshape(-1, 1), []
    >>> look = every(20, lambda now: seen.append((now.step, len(now.losses))))
    >>> guide = mean_field_normal(linear_regression)
    >>> _ = fit(linear_regression, guide, x, x[:, 0], steps=50, callbacks=[look], progress=False)
    >>> seen
    [(20, 20), (40, 20), (50, 10)]
    """
    return Every(positive_integer(steps, "steps"), callback)


def as_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks of a list or another iterable, or a ValueError that says what is none."""
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
    """Enter those callbacks that are context managers; leave them when the block ends, well or not.

    Those with a method ``resume`` are told before where the fit goes on,
    ``resume(start, step)``, where it does.
    """
    with ExitStack() as stack:
        inner = {id(one): one for one in (_inner(callback) for callback in callbacks)}
        for callback in inner.values():
            if resumed is not None and hasattr(callback, "resume"):
                callback.resume(*resumed)
            if isinstance(callback, AbstractContextManager):
                stack.enter_context(callback)
        yield


def _inner(callback: Callback) -> Callback:
    return _inner(callback.callback) if isinstance(callback, Every) else callback


def settled(losses: Tensor) -> float:
    """Where a fit ended: −ELBO in nats, the mean over the last tenth of its steps, (steps,)."""
    return losses[-max(1, len(losses) // 10) :].mean().item()


@dataclass
class _Due:
    """A callback, how often it is due, and the step that it was told of last."""

    callback: Callback
    every: int
    told: int = 0


class CallbackRunner:
    """The callbacks of one start of a fit, the steps at which each is due, and the losses so far.

    ``make`` is called with θ, the curves so far, (2, steps), and the seconds;
    ``start`` is the number of this start and how many there are.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        steps: int,
        layout: Params,
        make: Callable[[Tensor, Tensor, float], Posterior],
        start: tuple[int, int] = (1, 1),
    ) -> None:
        self._all = [_Due(callback, getattr(callback, "every", CHUNK)) for callback in callbacks]
        self.steps = steps
        self._layout = layout
        self._make = make
        self._start = start
        self._buffer: Tensor | None = None
        self._taken = 0
        self._began = time.perf_counter()
        self.may_change = any(not getattr(callback, "only_looks", False) for callback in callbacks)

    @property
    def curves(self) -> Tensor:
        """Losses and KL of all steps so far, (2, steps), not to be changed."""
        return torch.empty(2, 0) if self._buffer is None else self._buffer[:, : self._taken]

    def resume(self, curves: Tensor, seconds: float) -> None:
        """Go on after the steps with these losses and KL, (2, n), which took ``seconds``."""
        self._buffer = curves.new_empty(2, self.steps)
        self._taken = curves.shape[1]
        self._buffer[:, : self._taken] = curves
        self._began -= seconds
        for one in self._all:
            one.told = self._taken if self._taken == self.steps else self._taken - self._taken % one.every

    @property
    def seconds(self) -> float:
        """Since the first step."""
        return time.perf_counter() - self._began

    def until(self, step: int) -> int:
        """The next step at which a callback is due, or else the last."""
        return min([self.steps, *(step + one.every - step % one.every for one in self._all)])

    def tell(self, chunk: Tensor, iterates: IterateRecorder) -> bool:
        """Remember the losses and KL of the next steps, (n, 2), and call the callbacks due; whether there were any."""
        if self._buffer is None:
            self._buffer = chunk.new_empty(2, self.steps)
        self._buffer[:, self._taken : self._taken + len(chunk)] = chunk.T
        self._taken += len(chunk)
        told = [self._tell(*kept) for kept in iterates.kept]
        return any(told)

    def _tell(self, step: int, clock: float, flat_params: Tensor) -> bool:
        """Call the callbacks that are due at ``step``, which was at ``clock`` with this θ; whether there were any."""
        due = [one for one in self._all if step % one.every == 0 or step == self.steps]
        if not due:
            return False
        seconds, curves = clock - self._began, self.curves[:, :step]
        posterior = cache(lambda: self._make(flat_params, curves, seconds))
        about: dict[int, Progress] = {}
        for one in due:
            if one.told not in about:
                new = curves[:, one.told :].clone()
                progress = Progress(step, self.steps, new, seconds, flat_params, posterior, self._layout, *self._start)
                about[one.told] = progress
            one.callback(about[one.told])
            one.told = step
        return True
