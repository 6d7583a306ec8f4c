"""Checks of a fit as data: numbers, thresholds, reasons and a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from inference.arviz_compat import psis_shape

__all__ = ["Convergence", "Diagnosis", "NoWeights", "convergence", "diagnose", "khat_threshold", "pareto_khat"]


@dataclass(frozen=True)
class Convergence:
    """The ELBO at the end of a fit: what the last quarter of the steps gained over the quarter before.

    ``gain`` and its standard error ``gain_se`` are in nats; ``converged`` when
    the gain is below ``threshold`` or below two standard errors.
    """

    gain: float
    gain_se: float
    threshold: float
    converged: bool


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on a fit.

    ``khat`` is the median over repeats of the Pareto shape of the importance
    weights p(x, z)/q(z), ``khat_spread`` their standard deviation, both None
    for a point estimate. ``trusted`` is True only if every check passed;
    ``reasons`` says which did not, ``advice`` what to try.
    """

    trusted: bool
    khat: float | None
    khat_spread: float | None
    khat_threshold: float | None
    draws: int
    convergence: Convergence
    reasons: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """``"trust"`` or ``"don't trust"``."""
        return "trust" if self.trusted else "don't trust"


def khat_threshold(draws: int) -> float:
    """min(1 − 1/log₁₀ S, 0.7): above it, S weights do not pin down a mean.

    Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.

    >>> round(khat_threshold(1000), 3), khat_threshold(10**6)
    (0.667, 0.7)
    """
    return min(1 - 1 / math.log10(draws), 0.7)


def pareto_khat(log_weights: np.ndarray) -> float:
    """k̂, the shape of the generalised Pareto fitted to the largest of S importance weights."""
    finite = np.where(np.isfinite(log_weights), log_weights, -np.inf)
    if not np.isfinite(finite).any() or np.isposinf(log_weights).any():
        return math.inf
    return psis_shape(finite.astype(float))


def convergence(losses: np.ndarray) -> Convergence:
    """Compare the last quarter of the losses with the quarter before, by means of 20 blocks each."""
    window = len(losses) // 4
    if window < 50:
        return Convergence(math.nan, math.nan, math.nan, False)
    late, early = losses[-window:], losses[-2 * window : -window]
    gain = float(np.mean(early) - np.mean(late))
    gain_se = math.hypot(_standard_error(late), _standard_error(early))
    threshold = 0.5
    return Convergence(gain, gain_se, threshold, gain < max(threshold, 2 * gain_se))


def _standard_error(losses: np.ndarray, blocks: int = 20) -> float:
    means = [block.mean() for block in np.array_split(losses, blocks)]
    return float(np.std(means, ddof=1) / math.sqrt(blocks))


@dataclass(frozen=True)
class NoWeights:
    """Why a guide has no importance weights, and what to do instead."""

    reason: str
    advice: str


def diagnose(log_weights: np.ndarray | NoWeights, losses: np.ndarray) -> Diagnosis:
    """The verdict from R repeats of S log weights, shape (R, S) in nats, and the losses, −ELBO per step.

    Without weights there is no k-hat, and the fit cannot be said to be trusted.

    References
    ----------
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work? Evaluating variational inference.
    """
    state = convergence(losses)
    reasons, advice = _of_convergence(state, len(losses))
    if isinstance(log_weights, NoWeights):
        why, instead = (log_weights.reason, *reasons), (log_weights.advice, *advice)
        return Diagnosis(False, None, None, None, 0, state, why, instead)
    draws = log_weights.shape[1]
    khats = np.array([pareto_khat(row) for row in log_weights])
    khat, limit = float(np.median(khats)), khat_threshold(draws)
    spread = float(np.std(khats)) if np.isfinite(khats).all() else math.inf
    if not khat < limit:
        reasons += (f"Pareto k-hat is {khat:.2f}, above {limit:.2f}: the guide misses part of the posterior",)
        advice += ("try a richer guide, or re-parameterise the model",)
    return Diagnosis(not reasons, khat, spread, limit, draws, state, reasons, advice)


def _of_convergence(state: Convergence, steps: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if state.converged:
        return (), ()
    if math.isnan(state.gain):
        return (f"{steps} steps are too few to see whether the ELBO has settled",), ("take at least 200 steps",)
    why = (
        f"the ELBO was still rising, by {state.gain:.2g} ± {state.gain_se:.1g} nats over the last quarter of the steps"
    )
    return (why,), ("take more steps",)
