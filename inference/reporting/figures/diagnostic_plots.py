"""Figures that judge a fit: how even its importance weights are, and whether it is as sure as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

from inference.diagnostics.checks import OFF, Evidence
from inference.diagnostics.importance_sampling import LeaveOneOut, Moments
from inference.diagnostics.uniformity_tests import ecdf_band, thresholds
from inference.predictive.scoring import Coverage, Reliability
from inference.reporting.figures.posterior_plots import short
from inference.reporting.figures.style import BLUE, GREY, INK, ORANGE, STYLE, as_svg

__all__ = [
    "coverage_curve",
    "left_out_dots",
    "moments",
    "pit_histogram",
    "rank_panels",
    "reliability_diagram",
    "weights",
    "worst_first",
]

_MOST_LATENTS = 40
_POINTS = 200
_NAMED = 3  # observations whose numbers the figure of those left out shows
BINS, LEVEL = 20, 0.99


def weights(evidence: Evidence, limit: float) -> str:
    """The share of all weight that the heaviest draws carry, and the k-hat of each repeat beside its ``limit``."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        _shares(left, evidence.log_weights.reshape(-1))
        _khats(right, evidence.khats, limit)
        return as_svg(figure)


def _shares(axes: Axes, log_weights: np.ndarray) -> None:
    """Draw the shares of the heaviest weights; NaN counts as none, and where some are infinite, only these count."""
    log = np.where(np.isnan(log_weights), -np.inf, log_weights)
    top = log.max()
    raw = (log == top).astype(float) if np.isinf(top) else np.exp(log - top)
    share = np.cumsum(np.sort(raw)[::-1] / raw.sum())
    ranks = np.unique(np.geomspace(1, len(share), _POINTS).astype(int))
    axes.plot(ranks, ranks / len(share), color=GREY, lw=1, ls="--", label="all weights even")
    axes.plot(ranks, share[ranks - 1], color=BLUE, lw=1.8, label="found")
    axes.set(xscale="log", xlabel="heaviest draws", ylabel="their share of all weight", ylim=(0, 1.03))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="upper left", fontsize=9)


def _khats(axes: Axes, khats: np.ndarray, limit: float) -> None:
    finite = khats[np.isfinite(khats)]
    low = min(0.0, finite.min(initial=0.0) - 0.1)
    high = max(1.0, finite.max(initial=0.0) + 0.2)
    shown = np.where(np.isfinite(khats), khats, high)
    axes.axvspan(limit, 1.1 * high, color=GREY, alpha=0.25, lw=0)
    axes.axvline(limit, color=INK, lw=1.4, ls="--")
    where: dict[str, Any] = {
        "xycoords": ("data", "axes fraction"),
        "textcoords": "offset points",
        "ha": "right",
        "va": "top",
    }
    axes.annotate(f"limit {limit:.2f}", (limit, 1), (-3, -4), fontsize=9, rotation=90, **where)
    rows = np.arange(1, len(khats) + 1)
    for within, colour, marker in ((khats < limit, BLUE, "o"), (~(khats < limit), ORANGE, "D")):
        axes.plot(shown[within], rows[within], marker, color=colour, ms=6)
    for row in rows[~np.isfinite(khats)]:
        axes.annotate("∞", (high, row), (6, 0), textcoords="offset points", va="center")
    axes.set(xlabel="Pareto k-hat", ylabel="set of draws", xlim=(low, 1.1 * high), ylim=(0.3, len(khats) + 0.7))
    axes.set_yticks(rows)


def worst_first(moments: Moments) -> np.ndarray:
    """The numbers of the latents whose moments reach furthest from the posterior's, at most forty, the worst first."""
    return np.argsort(-np.maximum(moments.mean_reach, moments.ratio_reach), kind="stable")[:_MOST_LATENTS]


def moments(moments: Moments, shown: np.ndarray) -> str:
    """For each latent in ``shown`` its mean and its standard deviation against the posterior's, with ± 2 errors."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.21 * len(shown) + 1.1), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        names = [short(moments.names[i]) for i in shown]
        _dots(left, moments.mean[shown], moments.mean_se[shown], 0.0)
        _dots(right, moments.ratio[shown], moments.ratio_se[shown], 1.0)
        left.set_xlabel("difference of means (sd)")
        right.set_xlabel("ratio of standard deviations")
        left.set_yticks(range(len(shown)), names, fontsize=8)
        left.set_ylim(len(shown) - 0.4, -0.6)
        return as_svg(figure)


def _dots(axes: Axes, values: np.ndarray, errors: np.ndarray, right: float) -> None:
    axes.axvspan(right - OFF, right + OFF, color=GREY, alpha=0.25, lw=0)
    axes.axvline(right, color=INK, lw=0.8, ls="--")
    inside = np.abs(values - right) + 2 * errors <= OFF
    rows = np.arange(len(values))
    for mask, colour, marker in ((inside, BLUE, "o"), (~inside, ORANGE, "D")):
        axes.errorbar(values[mask], rows[mask], xerr=2 * errors[mask], fmt=marker, color=colour, ms=4, lw=1.2)
    reach = max(2 * OFF, float((np.abs(values - right) + 2 * errors).max()))
    axes.set_xlim(right - 1.08 * reach, right + 1.08 * reach)


def left_out_dots(found: LeaveOneOut) -> str:
    """Log probability of each observation given the others, and its Pareto k."""
    elpd, k = found.pointwise.reshape(-1), found.pareto_k.reshape(-1)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        good = k < found.threshold
        _observations(left, elpd, good)
        _observations(right, np.minimum(k, 2.0), good)
        for i in np.argsort(elpd)[:_NAMED]:
            left.annotate(f"{i:,}", (i, elpd[i]), (5, 0), textcoords="offset points", va="center", fontsize=9)
        right.axhline(found.threshold, color=INK, lw=1.4, ls="--", label=f"limit {found.threshold:.2f}")
        right.legend(loc="best", fontsize=9)
        left.set(xlabel="observation", ylabel="log probability, left out (nats)")
        right.set(xlabel="observation", ylabel="Pareto k (2 or more: drawn at 2)")
        return as_svg(figure)


def _observations(axes: Axes, values: np.ndarray, good: np.ndarray) -> None:
    rows = np.arange(len(values))
    axes.axhline(float(np.median(values)), color=GREY, lw=0.8)
    for mask, colour, marker in ((good, BLUE, "o"), (~good, ORANGE, "D")):
        axes.plot(rows[mask], values[mask], marker, color=colour, ms=3.5, alpha=0.8)
    axes.margins(x=0.06)


def pit_histogram(pit: np.ndarray) -> str:
    """The histogram of N PIT values, (N,), over the band in which bars of uniform ones lie, each with 99 %."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots()
        _uniform_bars(axes, pit, np.linspace(0, 1, min(BINS, max(4, len(pit) // 5)) + 1))
        axes.set(xlabel="share of the draws below the observation (PIT)", ylabel="rows")
        axes.legend(fontsize=9)
        return as_svg(figure)


def _uniform_bars(axes: Axes, u: np.ndarray, edges: np.ndarray) -> None:
    """Bars of numbers in (0, 1) with what is expected of uniform ones, and its binomial band."""
    shares = np.diff(edges)
    low, high = (np.r_[end, end[-1]] for end in binom.interval(LEVEL, len(u), shares))
    axes.fill_between(edges, low, high, step="post", color=GREY, alpha=0.35, lw=0, label=f"{LEVEL:.0%} of even bars")
    axes.stairs(len(u) * shares, edges, color=INK, lw=1, ls="--", label="expected", baseline=None)
    axes.stairs(np.histogram(u, edges)[0], edges, color=BLUE, lw=1.8, label="found")
    axes.set(xlim=(0, 1))
    axes.set_ylim(bottom=0)


def coverage_curve(pit: np.ndarray, coverage: tuple[Coverage, ...]) -> str:
    """The share of observations inside the central interval of each probability, and the named four with ± 2 errors."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        grid = np.linspace(0, 1, 201)
        inside = np.searchsorted(np.sort(2 * np.abs(pit - 0.5)), grid, side="right") / len(pit)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="as it should be")
        axes.plot(grid, inside, color=BLUE, lw=1.6, label="all intervals")
        probs, shares, errors = np.array([(c.prob, c.share, 2 * c.standard_error) for c in coverage]).T
        axes.errorbar(probs, shares, errors, fmt="D", color=ORANGE, ms=5, capsize=3, label="± 2 standard errors")
        axes.set(xlabel="probability of the interval", ylabel="share of rows inside", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend(loc="upper left", fontsize=9)
        return as_svg(figure)


def reliability_diagram(found: Reliability) -> str:
    """The share of right answers against the probability given to them, and below it the rows of each bin."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        confidence, right, error = (v.numpy() for v in (found.confidence, found.right, 2 * found.standard_error))
        upper.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="probability = share right")
        upper.errorbar(confidence, right, error, fmt="o", color=BLUE, capsize=3, label="± 2 standard errors")
        upper.set(ylabel="share right", ylim=(-0.03, 1.03))
        upper.legend(loc="upper left", fontsize=9)
        counts = found.counts.numpy()
        lower.vlines(confidence, 0, counts, color=BLUE, lw=5)
        for x, count in zip(confidence, counts, strict=True):
            lower.annotate(f"{count:,}", (x, count), ha="center", va="bottom", fontsize=8, color=INK)
        lower.set(xlabel="probability of the predicted class", ylabel="rows", ylim=(0, 1.3 * counts.max()))
        lower.set_xlim(min(0.5, confidence.min() - 0.05), 1.03)
        return as_svg(figure)


def rank_panels(p: np.ndarray, draws: int, titles: Sequence[str], level: float) -> Figure:
    """Draw a line for each parameter: the histogram of its ranks, and their ECDF less that of uniform ones.

    Parameters
    ----------
    p
        (fits, P): (rank + ½)/(L + 1).
    draws
        L.
    titles
        P of them.
    level
        The share of calibrated parameters whose ECDF leaves its band anywhere.
    """
    points = thresholds(draws)
    band = ecdf_band(len(p), points, level) / len(p) - points
    edges = np.unique(np.round(np.linspace(0, draws + 1, min(BINS, draws + 1) + 1))) / (draws + 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.9 * len(titles) + 0.7), layout="constrained")
        grid = figure.subplots(len(titles), 2, squeeze=False, sharex=True)
        for (left, right), column, title in zip(grid, p.T, titles, strict=True):
            _uniform_bars(left, column, edges)
            left.set_title(title, fontsize=9, loc="left")
            left.set_ylabel("fits")
            found = np.searchsorted(np.sort(column), points) / len(column) - points
            right.fill_between(points, *band, color=GREY, alpha=0.35, lw=0, label="where the whole ECDF should stay")
            right.axhline(0, color=INK, lw=1, ls="--")
            right.plot(points, found, color=BLUE, lw=1.6, label="ECDF found")
        grid[-1, 0].set_xlabel("rank of the truth among draws, as a share")
        grid[-1, 1].set_xlabel("rank of the truth among draws, as a share")
        grid[0, 1].set_title("ECDF less that of even ranks", fontsize=9, loc="left")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        more, names = grid[0, 1].get_legend_handles_labels()
        figure.legend(handles + more, labels + names, loc="outside lower center", ncols=3, fontsize=9)
        return figure
