"""What a predictor answers: the posterior predictive at new rows, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Array", "ClassPrediction", "Interval", "Prediction", "over_draws"]

Array = Any


class Interval(NamedTuple):
    """Lower and upper ends, each of the prediction's row shape."""

    lower: Array
    upper: Array


@dataclass(frozen=True)
class Prediction:
    """The posterior predictive at N rows, from S draws.

    Attributes
    ----------
    draws
        (S, N, …): E[y | x, zₛ], one function a row of the array.
    noise
        (N, …): E_z Var[y | x, z], the variance that stays when z is known.
    """

    site: str
    draws: Array
    noise: Array
    _sample: Callable[[], Array]

    @cached_property
    def samples(self) -> Array:
        """(S, N, …): y ~ p(y | x, zₛ), the function with its noise, by NumPy's random numbers."""
        return self._sample()

    @property
    def mean(self) -> Array:
        """E[y | x], shape (N, …)."""
        return over_draws(self.draws)

    @property
    def epistemic(self) -> Array:
        """Var_z E[y | x, z], shape (N, …): what more data would reduce."""
        return self.draws.var(0, dtype=np.float64).astype(self.draws.dtype)

    @property
    def variance(self) -> Array:
        """Var[y | x] = Var_z E[y | x, z] + E_z Var[y | x, z], shape (N, …)."""
        return self.epistemic + self.noise

    @property
    def std(self) -> Array:
        """The square root of ``variance``, in the units of y."""
        return np.sqrt(self.variance)

    def interval(self, prob: float = 0.9, of: str = "observations") -> Interval:
        """The central interval that holds ``prob`` of new observations, or of ``of="functions"``.

        Its ends are quantiles of ``samples``, one observation a draw, or of ``draws``.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob is {prob!r}: pass a share between 0 and 1, such as 0.9")
        if of not in ("observations", "functions"):
            raise ValueError(f"of is {of!r}: pass 'observations' or 'functions'")
        values = self.samples if of == "observations" else self.draws
        tail = (1 - prob) / 2
        return Interval(*np.quantile(values, [tail, 1 - tail], axis=0))


@dataclass(frozen=True)
class ClassPrediction:
    """Class probabilities at N rows, from S draws.

    Attributes
    ----------
    draws
        (S, N, C): p(class | x, zₛ), one function a row of the array.
    """

    site: str
    draws: Array
    _sample: Callable[[], Array]

    @cached_property
    def samples(self) -> Array:
        """(S, N): a class drawn from each, by NumPy's random numbers."""
        return self._sample()

    @property
    def probs(self) -> Array:
        """p(class | x), shape (N, C)."""
        return over_draws(self.draws)

    @property
    def labels(self) -> Array:
        """The most probable class, shape (N,)."""
        return self.probs.argmax(-1)

    @property
    def entropy(self) -> Array:
        """H[y | x] = −Σ p log p in nats, shape (N,): all uncertainty about the class."""
        return _entropy(self.probs)

    @property
    def mutual_information(self) -> Array:
        """I[y; z | x] = H[E_z p] − E_z H[p] in nats, shape (N,): the part that more data would reduce."""
        return np.maximum(self.entropy - over_draws(_entropy(self.draws)), 0)

    @property
    def variation_ratio(self) -> Array:
        """1 − f/S, shape (N,): the share of the S sampled classes that are not the most frequent one."""
        counts = (self.samples[..., None] == np.arange(self.draws.shape[-1])).sum(0)
        return 1 - counts.max(-1) / len(self.samples)


def over_draws(values: Array) -> Array:
    """The mean over S draws, added up in double precision."""
    return values.mean(0, dtype=np.float64).astype(values.dtype)


def _entropy(probs: Array) -> Array:
    return -(probs * np.log(np.where(probs > 0, probs, 1))).sum(-1)
