"""The figure of a calibration: the ranks of the truths, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.diagnostics.uniformity_tests import ecdf_band, thresholds
from inference.reporting.figures.calibration_plots import BINS, uniform_bars
from inference.reporting.figures.style import BLUE, GREY, INK, STYLE

__all__ = ["rank_panels"]


def rank_panels(p: np.ndarray, draws: int, titles: Sequence[str], level: float) -> Figure:
    """A line for each parameter: the histogram of its ranks, and their ECDF less that of uniform ones.

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
            uniform_bars(left, column, edges)
            left.set_title(title, fontsize=9, loc="left")
            left.set_ylabel("fits")
            _difference(right, column, points, band)
        grid[-1, 0].set_xlabel("rank of the truth among draws, as a share")
        grid[-1, 1].set_xlabel("rank of the truth among draws, as a share")
        grid[0, 1].set_title("ECDF less that of even ranks", fontsize=9, loc="left")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        more, names = grid[0, 1].get_legend_handles_labels()
        figure.legend(handles + more, labels + names, loc="outside lower center", ncols=3, fontsize=9)
        return figure


def _difference(axes: Axes, p: np.ndarray, points: np.ndarray, band: np.ndarray) -> None:
    found = np.searchsorted(np.sort(p), points) / len(p) - points
    axes.fill_between(points, *band, color=GREY, alpha=0.35, lw=0, label="where the whole ECDF should stay")
    axes.axhline(0, color=INK, lw=1, ls="--")
    axes.plot(points, found, color=BLUE, lw=1.6, label="ECDF found")
