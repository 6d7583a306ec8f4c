"""Importance weights of a guide's draws: how far they can be relied upon, and what they correct.

They also leave one observation out at a time, without another fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from inference.utils.arviz_compat import psis

__all__ = [
    "LeaveOneOut",
    "Moments",
    "Shift",
    "SmoothedWeights",
    "khat_threshold",
    "leave_one_out",
    "moments",
    "pareto_khat",
    "smoothed_weights",
]

_NUMBERS = 2**22  # log weights that are smoothed together
_NAMED = 10  # observations that a summary names


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
        """The most that each mean may be off, two standard errors included."""
        reach: np.ndarray = np.abs(self.mean) + 2 * self.mean_se
        return reach

    @property
    def ratio_reach(self) -> np.ndarray:
        """The most that each ratio may be from 1, two standard errors included."""
        reach: np.ndarray = np.abs(self.ratio - 1) + 2 * self.ratio_se
        return reach

    def worst(self) -> Shift:
        """The latents that reach furthest."""
        first, second = int(self.mean_reach.argmax()), int(self.ratio_reach.argmax())
        of_mean = float(abs(self.mean[first])), float(self.mean_se[first]), self.names[first]
        return Shift(*of_mean, float(self.ratio[second]), float(self.ratio_se[second]), self.names[second])


@dataclass(frozen=True)
class Shift:
    """Differences between the guide's moments and the posterior's at the worst latents, see :class:`Moments`.

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


@dataclass(frozen=True)
class LeaveOneOut:
    """Log probability of each observation under the posterior of all others, in nats, and how well that is known.

    Attributes
    ----------
    elpd, se
        Σᵢ log p(yᵢ | y₋ᵢ), and its standard error over observations, √(N Var elpdᵢ); NaN where there is one.
    mcse
        The Monte-Carlo standard error of ``elpd``, of S draws that all observations share.
    p_loo
        Σᵢ log p(yᵢ | y) − elpd: how many parameters the observations pay for.
    pointwise, pareto_k
        (N, …) as the log likelihood: elpdᵢ, and the k̂ of the weights that leave i out.
    khat
        The k̂ of the weights p(x, z)/q(z) of the guide itself.
    """

    site: str
    elpd: float
    se: float
    mcse: float
    p_loo: float
    pointwise: np.ndarray
    pareto_k: np.ndarray
    khat: float
    draws: int

    @property
    def threshold(self) -> float:
        """The k̂ from which on an ``elpdᵢ`` is not to be relied upon.

        See :func:`~inference.diagnostics.importance_sampling.khat_threshold`.
        """
        return khat_threshold(self.draws)

    @property
    def doubtful(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the observations whose Pareto k is at the threshold or above, the worst first."""
        k = self.pareto_k.reshape(-1)
        worst = [i for i in np.argsort(-k, kind="stable") if k[i] >= self.threshold]
        return tuple(tuple(map(int, np.unravel_index(i, self.pareto_k.shape))) for i in worst)

    def __str__(self) -> str:
        count, doubtful = self.pareto_k.size, self.doubtful
        summary = (
            f"{self.site}: elpd {self.elpd:.2f} ± {self.se:.2f} nats over {count:,} observations, "
            f"of which Monte-Carlo error {self.mcse:.2f}; p_loo {self.p_loo:.2f}; k-hat of the guide {self.khat:.2f}"
        )
        if not doubtful:
            return f"{summary}\nevery Pareto k is below {self.threshold:.2f}"
        named = ", ".join("[{}]".format(", ".join(map(str, index))) for index in doubtful[:_NAMED])
        more = f" and {len(doubtful) - _NAMED:,} more" if len(doubtful) > _NAMED else ""
        return (
            f"{summary}\n{len(doubtful):,} of {count:,} have a Pareto k of {self.threshold:.2f} or more, "
            f"{named}{more}: their elpd is not known, take more draws or fit without them"
        )


def leave_one_out(site: str, log_weights: np.ndarray, log_likelihoods: Iterable[np.ndarray]) -> LeaveOneOut:
    """Leave one observation out at a time, by S draws zₛ of q with log weights log p(y, zₛ) − log q(zₛ), (S,) in nats.

    The draws stand for the posterior without observation i by the weights
    rᵢₛ = p(y, zₛ) / (q(zₛ) p(yᵢ | zₛ)), Pareto-smoothed and normalised to wᵢₛ:
    elpdᵢ = log Σₛ wᵢₛ p(yᵢ | zₛ). With q in place of the posterior, as if p(y, z)/q(z)
    were constant, rᵢₛ = 1/p(yᵢ | zₛ) would take q's error for the model's.

    Parameters
    ----------
    log_likelihoods
        log p(yᵢ | zₛ), (S, n, …), one batch of observations after the other, or
        (S,) of a single one.

    References
    ----------
    Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian leave-one-out cross-validation for large data.
    Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC.
    """
    whole = smoothed_weights(log_weights)
    found, k, gain, shapes = [], [], 0.0, []
    influence = np.zeros(len(log_weights))
    for batch in log_likelihoods:
        shapes.append(batch.shape[1:])
        columns = batch.reshape(len(batch), -1)
        width = max(1, _NUMBERS // len(batch))  # observations that are smoothed together
        for begin in range(0, columns.shape[1], width):
            part = columns[:, begin : begin + width].T.astype(float)
            elpd, khat, change = _without_each(log_weights, part)
            found.append(elpd)
            k.append(khat)
            influence += change
            gain += float(logsumexp(whole.log + part, axis=1).sum() - elpd.sum())
    shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
    pointwise = np.concatenate(found)
    return LeaveOneOut(
        site,
        float(pointwise.sum()),
        math.sqrt(len(pointwise) * pointwise.var(ddof=1)) if len(pointwise) > 1 else math.nan,
        float(np.sqrt(np.square(influence).sum())),
        gain,
        pointwise.reshape(shape),
        np.concatenate(k).reshape(shape),
        whole.khat,
        len(log_weights),
    )


def _without_each(log_weights: np.ndarray, log_likelihood: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return elpdᵢ and k̂ᵢ, (n,), of (n, S) log likelihoods, and what each draw adds to the error of their sum, (S,).

    By the delta method that is Σᵢ wᵢₛ (p(yᵢ | zₛ)/exp(elpdᵢ) − 1).
    """
    impossible = np.isneginf(log_likelihood)  # such a draw has no weight in log_weights, but may have one without i
    ratios = np.where(impossible, -np.inf, log_weights - np.where(impossible, 0.0, log_likelihood))
    log, khat = psis(ratios)
    terms = log + log_likelihood
    elpd = logsumexp(terms, axis=1)
    change = np.exp(terms - elpd[:, None]) - np.exp(log)
    return elpd, np.where(impossible.any(1), np.inf, khat), change.sum(0)
