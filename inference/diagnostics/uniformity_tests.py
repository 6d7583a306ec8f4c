"""Tests of uniformity: exact p-values, the simultaneous band of an ECDF, and the shape of a difference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, bdtrc, gammaln
from scipy.stats import binom

__all__ = ["Shape", "ecdf_band", "ecdf_p_value", "holm", "symmetry_p_value", "thresholds"]

POINTS = 100  # at which an ECDF is looked at
_SEEN = 2.5  # standard errors from which a slope or a curvature is named


@dataclass(frozen=True)
class Shape:
    """Differences of N numbers in (0, 1) from uniform ones, in standard errors: their tilt and their curvature.

    With Legendre's polynomials, which have mean 0 under uniformity,
    slope = √(12/N) Σ (u − ½) and curvature = √(5/N) Σ (6u² − 6u + 1).
    """

    slope: float
    curvature: float

    @classmethod
    def of(cls, u: np.ndarray) -> Shape:
        """The shape of ``u``, (N,)."""
        size = len(u) ** 0.5
        return cls(12**0.5 * size * float(np.mean(u - 0.5)), 5**0.5 * size * float(np.mean(6 * u**2 - 6 * u + 1)))

    @property
    def words(self) -> tuple[str, ...]:
        """Words for the draws among which the numbers rank truths: many high ranks mean that draws lie too low."""
        named = {
            "too narrow": self.curvature,
            "too wide": -self.curvature,
            "shifted down": self.slope,
            "shifted up": -self.slope,
        }
        return tuple(sorted((word for word, z in named.items() if z > _SEEN), key=lambda word: -named[word]))


def thresholds(draws: int | None = None) -> np.ndarray:
    """Return the points of an ECDF: even shares in (0, 1), of which ranks among L ``draws`` can be below."""
    if draws is None:
        return np.arange(1, POINTS) / POINTS
    places = min(POINTS, draws + 1)
    return np.unique(np.round(np.arange(1, places) * (draws + 1) / places)) / (draws + 1)


def ecdf_p_value(u: np.ndarray, points: np.ndarray) -> float:
    """P(γ* ≤ γ) for N independent uniform numbers: a test of uniformity that is exact, for ranks too.

    γ = minᵢ 2 min{P(C ≤ cᵢ), P(C ≥ cᵢ)}, where cᵢ counts the numbers below the
    point zᵢ and C ~ Binomial(N, zᵢ).

    Parameters
    ----------
    u
        (N,); ranks among L draws as (rank + ½)/(L + 1).
    points
        z, such as :func:`thresholds` gives.

    References
    ----------
    Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison.

    Examples
    --------
    >>> even = (np.arange(200) + 0.5) / 200
    >>> ecdf_p_value(even, thresholds()) > 0.99, ecdf_p_value(even**2, thresholds()) < 1e-6
    (True, True)
    """
    counts = np.searchsorted(np.sort(u), points)
    tails = 2 * np.minimum(bdtr(counts, len(u), points), bdtrc(counts - 1, len(u), points))
    return _leaving(len(u), points, float(tails.min()))


def ecdf_band(size: int, points: np.ndarray, level: float) -> np.ndarray:
    """Least and largest counts below each of the ``points``, (2, K), which ``size`` uniform numbers keep within.

    At all points at once, but for a share of at most ``level``; as in :func:`ecdf_p_value`.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _leaving(size, points, middle) <= level else (low, middle)
    return _bounds(size, points, low)


def _bounds(size: int, points: np.ndarray, gamma: float) -> np.ndarray:
    """The counts, (2, K), whose two-sided binomial tail probability is above ``gamma``."""
    tail = np.nextafter(gamma / 2 * (1 + 1e-9), 1.0)
    return np.stack([binom.ppf(tail, size, points), size - binom.ppf(tail, size, 1 - points)]).astype(int)


def _leaving(size: int, points: np.ndarray, gamma: float) -> float:
    """P(γ* ≤ γ): the counts of uniform numbers leave the bounds of ``gamma`` at any of the points.

    Counts between points are independent Poisson numbers, given that they sum to N.
    Moscovich, Nadler (2017), Fast calculation of boundary crossing probabilities for Poisson processes.
    """
    lower, upper = _bounds(size, points, gamma)
    if (lower > upper).any():
        return 1.0
    lower, upper = np.r_[0, lower, size], np.r_[0, upper, size]
    inside = np.ones(1)
    for i, width in enumerate(np.diff(np.r_[0.0, points, 1.0])):
        steps = np.arange(lower[i + 1] - upper[i], upper[i + 1] - lower[i] + 1)
        inside = np.convolve(_poisson(steps, size * width), inside, mode="valid")
    return float(np.clip(1 - inside[0] / _poisson(np.array(size), size), 0.0, 1.0))


def _poisson(counts: np.ndarray, mean: float) -> np.ndarray:
    """Probabilities of ``counts``, 0 of those below 0."""
    found: np.ndarray = np.exp(counts * np.log(mean) - mean - gammaln(counts + 1))
    return found


def symmetry_p_value(p: np.ndarray) -> float:
    """The probability of so large a Kolmogorov–Smirnov distance between p and 1 − p if p is symmetric about ½.

    sup |F(x) − G(x)| with G the ECDF of 1 − p is max |Sₖ|/N, Sₖ the sum of the
    signs of p − ½ over the k numbers farthest from ½: a random walk, whose
    distribution is taken, as the mirrored sample is no second sample. Exact
    where no two numbers are equally far from ½, else no smaller than that.

    References
    ----------
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work? Evaluating variational inference.
    Butler (1969), A test for symmetry using the sample distribution function.

    Examples
    --------
    >>> symmetry_p_value(np.array([0.1, 0.9, 0.2, 0.8])), symmetry_p_value(np.full(10, 0.9)) < 0.01
    (1.0, True)
    """
    distance, group = np.unique(-np.abs(p - 0.5).round(12), return_inverse=True)
    walk = np.cumsum(np.bincount(group, np.sign((p - 0.5).round(12)), len(distance)))
    return _reaching(int(np.abs(walk).max()), int(np.count_nonzero(distance[group])))


def _reaching(barrier: int, steps: int) -> float:
    """P(max |Sₖ| ≥ barrier) of a symmetric random walk."""
    if barrier == 0:
        return 1.0
    inside = np.zeros(2 * barrier - 1)
    inside[barrier - 1] = 1.0
    for _ in range(steps):
        inside = (np.r_[inside[1:], 0.0] + np.r_[0.0, inside[:-1]]) / 2
    return float(np.clip(1 - inside.sum(), 0.0, 1.0))


def holm(p: np.ndarray) -> np.ndarray:
    """p-values, (T,), adjusted: the chance that any true null falls below α is α at most, whatever their dependence.

    Holm (1979), A simple sequentially rejective multiple test procedure.

    >>> holm(np.array([0.01, 0.5, 0.02]))
    array([0.03, 0.5 , 0.04])
    """
    order = np.argsort(p)
    scaled = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))
    adjusted = np.empty_like(scaled)
    adjusted[order] = scaled
    return adjusted
