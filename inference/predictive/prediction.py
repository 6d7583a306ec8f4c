"""Predictions: one draw of the latents gives one function of all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from inference.utils.validation import one_of, share

__all__ = [
    "ClassPrediction",
    "Interval",
    "Labelled",
    "Prediction",
    "Spread",
    "quantile",
    "tails",
]

OF = ("observations", "functions")
LatentValues = Mapping[str, Tensor]


class Interval(NamedTuple):
    """Lower and upper ends, each of the prediction's row shape."""

    lower: Tensor
    upper: Tensor


class _Parts(Protocol):
    @property
    def epistemic(self) -> Tensor: ...

    @property
    def noise(self) -> Tensor: ...


class Spread:
    """Variance of observations: what the functions leave open, and the noise."""

    @property
    def variance(self: _Parts) -> Tensor:
        """Var[y | x] = Var_z E[y | x, z] + E_z Var[y | x, z], shape (N, …)."""
        return self.epistemic + self.noise

    @property
    def std(self: _Parts) -> Tensor:
        """The square root of :attr:`variance`, in the units of y."""
        return (self.epistemic + self.noise).sqrt()


class _Classes(Protocol):
    @property
    def probs(self) -> Tensor: ...


class Labelled:
    """The class that probabilities are for."""

    @property
    def labels(self: _Classes) -> Tensor:
        """The most probable class, shape (N,)."""
        return self.probs.argmax(-1)


@dataclass(frozen=True)
class Prediction(Spread):
    """The posterior predictive at N rows, from S draws; every tensor is on the CPU.

    Attributes
    ----------
    draws
        (S, N, …): E[y | x, zₛ], one function a row of the tensor.
    samples
        (S, N, …): y ~ p(y | x, zₛ), the function with its noise.
    noise
        (N, …): E_z Var[y | x, z], the variance that stays when z is known.
    """

    site: str
    draws: Tensor
    samples: Tensor
    noise: Tensor

    @property
    def mean(self) -> Tensor:
        """E[y | x], shape (N, …)."""
        return self.draws.mean(0)

    @property
    def epistemic(self) -> Tensor:
        """Var_z E[y | x, z], shape (N, …): what more data would reduce."""
        return self.draws.var(0, correction=0)

    def interval(self, prob: float = 0.9, of: str = "observations") -> Interval:
        """The central interval that holds ``prob`` of new observations, or of ``of="functions"``.

        Raises
        ------
        ValueError
            Unless 0 < prob < 1 and ``of`` is one of the two.
        """
        return Interval(*self.quantiles(tails(prob), of))

    def quantiles(self, levels: Sequence[float], of: str = "observations") -> Tensor:
        """The quantiles at Q ``levels`` of observations, or of ``of="functions"``, shape (Q, N, …).

        Raises
        ------
        ValueError
            Unless ``of`` is one of the two.
        """
        values = self.samples if one_of(of, "of", OF) == "observations" else self.draws
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=0))
        return torch.stack([quantile(ordered, level) for level in levels])


@dataclass(frozen=True)
class ClassPrediction(Labelled):
    """Class probabilities at N rows, from S draws; every tensor is on the CPU.

    Attributes
    ----------
    draws
        (S, N, C): p(class | x, zₛ), one function a row of the tensor.
    samples
        (S, N): a class drawn from each.
    """

    site: str
    draws: Tensor
    samples: Tensor

    @property
    def probs(self) -> Tensor:
        """p(class | x), shape (N, C)."""
        return self.draws.mean(0)

    @property
    def entropy(self) -> Tensor:
        """H[y | x] = −Σ p log p in nats, shape (N,): all uncertainty about the class."""
        return _entropy(self.probs)

    @property
    def mutual_information(self) -> Tensor:
        """I[y; z | x] = H[E_z p] − E_z H[p] in nats, shape (N,): the part that more data would reduce.

        Houlsby, Huszár, Ghahramani, Lengyel (2011), Bayesian active learning by disagreement.
        """
        return (self.entropy - _entropy(self.draws).mean(0)).clamp_min(0)

    @property
    def variation_ratio(self) -> Tensor:
        """1 − f/S, shape (N,): the share of the S sampled classes that are not the most frequent one.

        Freeman (1965), Elementary applied statistics, as in Gal (2016), Uncertainty in deep learning.
        """
        counts = torch.nn.functional.one_hot(self.samples.long(), self.draws.shape[-1]).sum(0)
        return 1 - counts.max(-1).values / len(self.samples)


def tails(prob: float) -> tuple[float, float]:
    """The levels of the two quantiles between which the central interval of ``prob`` lies.

    >>> tails(0.5)
    (0.25, 0.75)
    """
    tail = (1 - share(prob, "prob")) / 2
    return tail, 1 - tail


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)


def quantile(ordered: Tensor, q: float) -> Tensor:
    """Along sorted draws, interpolated; ``torch.quantile`` refuses large inputs."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)
