"""Watching a fit: what a callback is told, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inference.arguments import positive_integer
from inference.posterior import Posterior

__all__ = ["CHUNK", "Callback", "Every", "Progress", "Watch", "every"]

CHUNK = 100


@dataclass(frozen=True)
class Progress:
    """What a callback is told between chunks of steps.

    Attributes
    ----------
    step, steps
        Steps taken, and to take.
    losses, kl
        −ELBO in nats, and KL(q ‖ p(z)), of the steps since this callback was
        called last, (n,) each.
    seconds
        Since the first step.
    flat
        θ, all unconstrained parameters in one vector, (P,).
    """

    step: int
    steps: int
    losses: Tensor
    kl: Tensor
    seconds: float
    flat: Tensor
    made: Callable[[], Posterior] = field(repr=False)

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


@dataclass
class _Due:
    """A callback, how often it is due, and the steps that it was not told of yet."""

    callback: Callback
    every: int
    pending: list[Tensor] = field(default_factory=list)


class Watch:
    """The callbacks of one fit, the steps at which each is due, and the losses so far.

    ``make`` is called with θ, the losses so far, (steps, 2), and the seconds.
    """

    def __init__(
        self, callbacks: Sequence[Callback], steps: int, make: Callable[[Tensor, Tensor, float], Posterior]
    ) -> None:
        self._all = [_Due(callback, getattr(callback, "every", CHUNK)) for callback in callbacks]
        self.steps = steps
        self._make = make
        self._chunks: list[Tensor] = []
        self._began = time.perf_counter()
        self.may_change = any(not getattr(callback, "only_looks", False) for callback in callbacks)

    @property
    def losses(self) -> Tensor:
        """Losses and KL of all steps so far, (steps, 2)."""
        self._chunks = [torch.cat(self._chunks)]
        return self._chunks[0]

    @property
    def seconds(self) -> float:
        """Since the fit began."""
        return time.perf_counter() - self._began

    def until(self, step: int) -> int:
        """The next step at which a callback is due, or else the last."""
        return min([self.steps, *(step + one.every - step % one.every for one in self._all)])

    def tell(self, step: int, flat: Tensor, chunk: Tensor) -> bool:
        """Call the callbacks that are due at ``step``; whether there were any."""
        self._chunks.append(chunk)
        for one in self._all:
            one.pending.append(chunk)
        due = [one for one in self._all if step % one.every == 0 or step == self.steps]
        if not due:
            return False
        now, seconds = flat.detach().clone(), self.seconds
        posterior = cache(lambda: self._make(now, self.losses, seconds))
        for one in due:
            losses, kl = torch.cat(one.pending).unbind(1)
            one.pending.clear()
            one.callback(Progress(step, self.steps, losses, kl, seconds, now, posterior))
        return True
