"""Figures of calibration: whether predictions, or the posteriors of simulated data, are as sure as they should be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

from inference.diagnostics.uniformity_tests import ecdf_band, thresholds
from inference.predictive.scoring import Coverage, Reliability
from inference.reporting.figures.style import BLUE, GREY, INK, ORANGE, STYLE, as_svg

__all__ = ["coverage_curve", "pit_histogram", "rank_panels", "reliability_diagram"]

BINS, LEVEL = 20, 0.99


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
