"""Checks of a fit as data: numbers, limits, what was found in words, and a verdict.

A new check is written here and nowhere else: its :class:`CheckKind`, which holds all
words of it, and the function that computes it, called by :func:`diagnose`. The
verdict, the report and the command line follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from inference.diagnostics.importance_sampling import Moments, Shift, khat_threshold, moments, smoothed_weights
from inference.optim.adaptive import RHAT, StopReason
from inference.optim.convergence import Convergence, convergence

__all__ = [
    "NO_WEIGHTS",
    "OFF",
    "Check",
    "CheckKind",
    "Diagnosis",
    "Evidence",
    "NoWeights",
    "Topic",
    "diagnose",
    "weight_checks",
]

OFF = 0.07  # of a mean, in posterior sds, and of a ratio of sds from 1; see diagnose
_LEAST = 100  # draws of the posterior that the weights must be worth, for what they correct to be known
_LONGER = "take more steps"
_RICHER = "try a guide with more shape, or re-parameterise the model"
_CORRECT = (
    "take corrected draws, posterior.sample(1000, corrected=True); average more draws in each step, particles=128; or "
    f"{_RICHER}"
)


class Topic(Enum):
    """The part of a report that shows a check: the steps, the importance weights, or the moments of the guide."""

    STEPS = auto()
    WEIGHTS = auto()
    MOMENTS = auto()


@dataclass(frozen=True)
class CheckKind:
    """Name and words of a check, which the report and the command line show.

    ``number`` and ``limit`` are format strings of the value and its limit,
    ``meaning`` says what is measured and why, and ``failure`` says what a failed
    check means to a reader who knows no statistics.
    """

    name: str
    topic: Topic
    number: str = "{:.3g}"
    limit: str = "{:.3g}"
    meaning: str = ""
    failure: str = ""


_ELBO = CheckKind(
    "ELBO",
    Topic.STEPS,
    number="gain {:,.2f} nats",
    limit="at most {:,.2f}",
    meaning=("The ELBO is the score that fitting pushes up: while it still rises, a better answer is some steps away."),
    failure="The search had not finished: its score was still rising when it ended.",
)
_RHAT_OF_STEPS = CheckKind(
    "R-hat of the steps",
    Topic.STEPS,
    number="{:.3f}",
    limit="below {:.2g}",
    meaning=(
        "At the end of a search the steps should wander about one place: R-hat compares stretches of them "
        "with one another, and is 1 where they agree."
    ),
    failure="The search had not finished: its last steps had not come to rest in one place.",
)
NO_WEIGHTS = CheckKind(
    "weights",
    Topic.WEIGHTS,
    number="none",
    limit="none",
    meaning=(
        "Importance weights compare the guide with the posterior draw by draw: without them only predictions "
        "can be checked, on rows that were held out."
    ),
)
_KHAT = CheckKind(
    "Pareto k-hat",
    Topic.WEIGHTS,
    number="{:.2f}",
    limit="below {:.2f}",
    meaning=(
        "How badly the guide misses the places where the posterior lies: the smaller the better, and above "
        "the limit what is corrected by weights means little."
    ),
    failure="The approximation has the wrong shape: it misses part of what the data allow.",
)
_SAMPLE_SIZE = CheckKind(
    "effective sample size",
    Topic.WEIGHTS,
    number="{:,.0f} draws",
    limit="at least {:,.0f}",
    meaning=(
        "How many draws of the posterior the guide's draws are worth: with too few there is nothing to compare with."
    ),
    failure="The approximation and the true posterior overlap too little to be compared.",
)
_MEANS = CheckKind(
    "means",
    Topic.MOMENTS,
    number="{:.2f} sd",
    limit="at most {:.2f}, two standard errors included",
    meaning=(
        "The best estimate of each unknown against a corrected one, in units of its own uncertainty; the worst counts."
    ),
    failure="Best estimates may be off by a notable part of their uncertainty.",
)
_SPREADS = CheckKind(
    "standard deviations",
    Topic.MOMENTS,
    number="ratio {:.2f}",
    limit="1 ± {:.2f}, two standard errors included",
    meaning=(
        "The stated uncertainty of each unknown over a corrected one: 1 is right, less is too sure, more is "
        "not sure enough; the worst counts."
    ),
    failure="Stated uncertainties may be notably too small or too large.",
)


@dataclass(frozen=True)
class Check:
    """One question about a fit: the ``value`` found, the ``limit`` it is held against, and whether it ``passed``.

    ``found`` says so in words, ``advice`` what to try where it failed.
    """

    kind: CheckKind
    value: float
    limit: float
    passed: bool
    found: str
    advice: str

    @property
    def name(self) -> str:
        """Name of the check."""
        return self.kind.name


@dataclass(frozen=True, eq=False)
class Evidence:
    """Numbers behind the checks of the importance weights, for figures.

    ``log_weights`` are those of R repeats of S draws, (R, S) in nats, ``khats``
    the Pareto k-hat of each repeat, (R,), ``moments`` those of each latent, None
    where they were not compared.
    """

    log_weights: np.ndarray
    khats: np.ndarray
    moments: Moments | None

    @property
    def elbo(self) -> tuple[float, float]:
        """The mean of all log weights, which is the ELBO of the guide, in nats, and its standard error."""
        with np.errstate(invalid="ignore"):  # a weight of 0 makes it −∞, of no known error
            error = self.log_weights.std() / math.sqrt(self.log_weights.size)
        return float(self.log_weights.mean()), float(error)


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on a fit: trusted only if every one of the ``checks`` passed.

    ``khat`` is the median over repeats of the Pareto shape of the importance
    weights p(x, z)/q(z), ``khat_spread`` their standard deviation; ``ess`` how
    many draws of the posterior the weights of all repeats together are worth;
    ``shift`` how far the guide's moments are from those that the weights correct,
    None also where there are too many latents to keep. All None where the guide
    has no weights. ``draws`` are those of one repeat, ``evidence`` what all of it was seen from.
    """

    checks: tuple[Check, ...]
    convergence: Convergence
    draws: int = 0
    khat: float | None = None
    khat_spread: float | None = None
    khat_threshold: float | None = None
    ess: float | None = None
    shift: Shift | None = None
    evidence: Evidence | None = field(default=None, compare=False, repr=False)

    @property
    def trusted(self) -> bool:
        """True if every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """``"trust"`` or ``"don't trust"``."""
        return "trust" if self.trusted else "don't trust"

    @property
    def reasons(self) -> tuple[str, ...]:
        """The findings of the checks that failed."""
        return tuple(check.found for check in self.checks if not check.passed)

    @property
    def advice(self) -> tuple[str, ...]:
        """Things to try, the most promising first."""
        return tuple(dict.fromkeys(check.advice for check in self.checks if not check.passed))


@dataclass(frozen=True)
class NoWeights:
    """The reason why a guide has no importance weights, and what to do instead."""

    reason: str
    advice: str


def diagnose(
    log_weights: np.ndarray | NoWeights,
    losses: np.ndarray,
    values: Mapping[str, np.ndarray] | None = None,
    stop: StopReason | None = None,
) -> Diagnosis:
    """The verdict from R repeats of S log weights, (R, S) in nats, the latents at the same draws, and −ELBO per step.

    ``values`` are the latents by name, (R·S,) each. Without weights there is no
    k-hat, and the fit cannot be said to be trusted. It is where k-hat is below
    its threshold, the weights are worth 100 draws, and the guide's means and
    standard deviations are within 0.07 of those that the weights correct (in
    posterior standard deviations, and as a ratio), two standard errors included;
    each is asked only where the one before passed. What is wanted is a tenth: where
    the posterior's tails are heavier than the guide's, smoothed weights correct
    some of what they should.

    References
    ----------
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work? Evaluating variational inference.
    Dhaka et al. (2020), Robust, accurate stochastic optimization for variational inference.
    """
    state = convergence(losses)
    settled = [_check_elbo(state, len(losses))]
    if stop is not None and stop.rhat is not None:
        settled.append(Check(_RHAT_OF_STEPS, stop.rhat, RHAT, stop.settled, stop.rest, _LONGER))
    if isinstance(log_weights, NoWeights):
        none = Check(NO_WEIGHTS, math.nan, math.nan, False, log_weights.reason, log_weights.advice)
        return Diagnosis((none, *settled), state)
    seen = _Weights.of(log_weights, values)
    checks = (*settled, *seen.checks())
    return Diagnosis(checks, state, seen.draws, seen.khat, seen.spread, seen.limit, seen.ess, seen.shift, seen.evidence)


def weight_checks(log_weights: np.ndarray, values: Mapping[str, np.ndarray] | None = None) -> tuple[Check, ...]:
    """The checks of :func:`diagnose` that importance weights alone can make."""
    return _Weights.of(log_weights, values).checks()


@dataclass(frozen=True)
class _Weights:
    draws: int
    size: int
    khat: float
    spread: float
    limit: float
    ess: float
    evidence: Evidence

    @classmethod
    def of(cls, log_weights: np.ndarray, values: Mapping[str, np.ndarray] | None) -> _Weights:
        khats = np.array([smoothed_weights(row).khat for row in log_weights])
        spread = float(np.std(khats)) if np.isfinite(khats).all() else math.inf
        pooled, draws = smoothed_weights(log_weights.reshape(-1)), log_weights.shape[1]
        evidence = Evidence(log_weights, khats, moments(values, pooled) if values else None)
        khat = float(np.median(khats))
        return cls(draws, log_weights.size, khat, spread, khat_threshold(draws), pooled.ess, evidence)

    @property
    def shift(self) -> Shift | None:
        return None if self.evidence.moments is None else self.evidence.moments.worst()

    def checks(self) -> tuple[Check, ...]:
        """Check k-hat; if it is good, what the weights are worth; if that is enough, what they correct."""
        covers = self.khat < self.limit
        where = "below" if covers else "above"
        words = "the guide covers the posterior" if covers else "the guide misses part of the posterior"
        found = f"Pareto k-hat is {self.khat:.2f}, {where} {self.limit:.2f}: {words}"
        khat = Check(_KHAT, self.khat, self.limit, covers, found, _RICHER)
        if not khat.passed:
            return (khat,)
        found = f"the weights of {self.size:,} draws are worth {self.ess:,.0f} of the posterior's"
        if self.ess < _LEAST:
            found += f", too few to compare with, which takes {_LEAST}"
        worth = Check(_SAMPLE_SIZE, self.ess, _LEAST, self.ess >= _LEAST, found, _RICHER)
        if not worth.passed or self.shift is None:
            return khat, worth
        return khat, worth, *_check_moments(self.shift)


def _check_elbo(state: Convergence, steps: int) -> Check:
    if math.isnan(state.gain):
        words = f"{steps} steps are too few to see whether the ELBO has settled"
        return Check(_ELBO, math.nan, state.threshold, False, words, "take at least 200 steps")
    gain = f"{state.gain:.2g} ± {state.gain_se:.1g} nats over the last quarter of the steps"
    words = f"the ELBO had settled, gaining {gain}" if state.converged else f"the ELBO was still rising, by {gain}"
    return Check(_ELBO, state.gain, max(state.threshold, 2 * state.gain_se), state.converged, words, _LONGER)


def _check_moments(moved: Shift) -> tuple[Check, Check]:
    means = moved.mean + 2 * moved.mean_se <= OFF
    words = f"no mean is off by more than {moved.mean:.2f} posterior sds ({moved.mean_at})"
    if not means:
        words = f"the mean of {moved.mean_at} is off by {moved.mean:.2f} ± {moved.mean_se:.2f} posterior sds"
    spreads = moved.ratio_off + 2 * moved.ratio_se <= OFF
    of_spreads = f"every standard deviation is within {moved.ratio_off:.0%} of the posterior's ({moved.ratio_at})"
    if not spreads:
        of_spreads = (
            f"the standard deviation of {moved.ratio_at} is {moved.ratio:.2f} ± {moved.ratio_se:.2f} of the posterior's"
        )
    return (
        Check(_MEANS, moved.mean, OFF, means, words, _CORRECT),
        Check(_SPREADS, moved.ratio, OFF, spreads, of_spreads, _CORRECT),
    )
