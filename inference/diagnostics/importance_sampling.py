"""Importance weights of a guide's draws: how far they can be relied upon, and what they correct."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from inference.utils.arviz_compat import psis

__all__ = ["Moments", "Shift", "SmoothedWeights", "khat_threshold", "moments", "pareto_khat", "smoothed_weights"]


@dataclass(frozen=True)
class SmoothedWeights:
    """S importance weights p(x, z)/q(z), Pareto-smoothed and normalised.

    ``log`` is (S,), in nats, its exponentials summing to 1; ``khat`` the shape of
    the generalised Pareto fitted to the largest of the raw ones; ``ess`` = 1/Σw²,
    as many draws of the posterior itself would be worth as much.
    """

    log: np.ndarray
    khat: float
    ess: float

    def moments(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the posterior, (P,) each, of values (S, P) at the draws."""
        weights = np.exp(self.log)
        mean = weights @ values
        return mean, np.sqrt(weights @ np.square(values - mean))

    def resampled(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """The numbers of ``count`` of the draws, each as often as its weight says, in random order.

        Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space models (systematic).
        """
        levels = (np.arange(count) + rng.random()) / count
        found = np.searchsorted(np.cumsum(np.exp(self.log)), levels).clip(max=len(self.log) - 1)
        return rng.permutation(found)


@dataclass(frozen=True, eq=False)
class Moments:
    """The guide's moments beside the posterior's, as its own weights correct them, of P latents that vary.

    ``mean`` is the guide's mean less the posterior's, in posterior standard
    deviations, ``ratio`` its standard deviation over the posterior's; all (P,),
    each with its Monte-Carlo standard error.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    mean_se: np.ndarray
    ratio: np.ndarray
    ratio_se: np.ndarray

    @property
    def mean_reach(self) -> np.ndarray:
        """How far each mean may be off, two standard errors included."""
        reach: np.ndarray = np.abs(self.mean) + 2 * self.mean_se
        return reach

    @property
    def ratio_reach(self) -> np.ndarray:
        """How far each ratio may be from 1, two standard errors included."""
        reach: np.ndarray = np.abs(self.ratio - 1) + 2 * self.ratio_se
        return reach

    def worst(self) -> Shift:
        """The latents that reach furthest."""
        first, second = int(self.mean_reach.argmax()), int(self.ratio_reach.argmax())
        of_mean = float(abs(self.mean[first])), float(self.mean_se[first]), self.names[first]
        return Shift(*of_mean, float(self.ratio[second]), float(self.ratio_se[second]), self.names[second])


@dataclass(frozen=True)
class Shift:
    """How far the guide's moments are from the posterior's at the worst latents, see :class:`Moments`.

    ``mean`` is the largest difference of a mean, in posterior standard deviations,
    at the latent ``mean_at``; ``ratio`` the guide's standard deviation over the
    posterior's where it is furthest from 1, at ``ratio_at``; each with its
    Monte-Carlo standard error.
    """

    mean: float
    mean_se: float
    mean_at: str
    ratio: float
    ratio_se: float
    ratio_at: str

    @property
    def ratio_off(self) -> float:
        """|ratio − 1|."""
        return abs(self.ratio - 1)


def smoothed_weights(log_weights: np.ndarray) -> SmoothedWeights:
    """Pareto-smoothed importance weights of S log weights, in nats.

    Weights that are equal but for rounding, an exact guide's, have no tail: k-hat is 0.

    Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
    """
    finite = np.where(np.isfinite(log_weights), log_weights, -np.inf).astype(float)
    if not np.isfinite(finite).any() or np.isposinf(log_weights).any():
        even = np.full(len(finite), -math.log(len(finite)))
        return SmoothedWeights(even, math.inf, 0.0)
    log, khat = psis(finite)
    return SmoothedWeights(log, float(khat), float(1 / np.exp(2 * log).sum()))


def pareto_khat(log_weights: np.ndarray) -> float:
    """k̂, the shape of the generalised Pareto fitted to the largest of S importance weights."""
    return smoothed_weights(log_weights).khat


def khat_threshold(draws: int) -> float:
    """min(1 − 1/log₁₀ S, 0.7): above it, S weights do not pin down a mean.

    Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.

    >>> round(khat_threshold(1000), 3), khat_threshold(10**6)
    (0.667, 0.7)
    """
    return min(1 - 1 / math.log10(draws), 0.7) if draws > 1 else -math.inf


def moments(values: Mapping[str, np.ndarray], weights: SmoothedWeights) -> Moments | None:
    """Compare S draws by latent, ``{name: (S,)}``, with the same draws weighted; None where none of them varies."""
    draws = np.stack(list(values.values()), 1)
    mean, sd = weights.moments(draws)
    varies = (sd > 0) & (draws.std(0) > 0)
    if not varies.any():
        return None
    names = tuple(name for name, kept in zip(values, varies, strict=True) if kept)
    centred = (draws[:, varies] - mean[varies]) / sd[varies]
    change = (np.exp(weights.log) - 1 / len(centred))[:, None]
    with np.errstate(over="ignore"):  # what is beyond all numbers is infinite: nothing is known
        mean_se, ratio_se = (np.sqrt(np.square(change * power).sum(0)) for power in (centred, np.square(centred)))
        return Moments(names, centred.mean(0), mean_se, centred.std(0), ratio_se / 2)
