"""Figures of several fits side by side, told apart by marker and dashes as well as by colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from inference.predictive.scoring import Reliability
from inference.reporting.figures.posterior_plots import settled_range, short
from inference.reporting.figures.style import BLUE, GREY, INK, ORANGE, STYLE, as_svg

__all__ = ["coverage_curves", "elbo_curves", "intervals", "reliability_curves"]

LOOKS = ((BLUE, "-", "o"), (ORANGE, "--", "D"), (INK, "-.", "s"), ("#6b3fa0", ":", "^"), ("#1b6e3c", (0, (6, 2)), "v"))
_POINTS, _MARKS, _COLUMNS = 400, 8, 3


def _looks(names: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (colour, dashes, marker) in zip(names, cycle(LOOKS), strict=False):
        yield name, {"color": colour, "ls": dashes, "marker": marker, "label": short(name)}


def elbo_curves(losses: Mapping[str, np.ndarray], *, together: bool) -> str:
    """The running mean of the ELBO (+, in nats) of each fit, −``losses``, in one panel or one panel each."""
    with rc_context(STYLE):
        count = 1 if together else len(losses)
        figure = Figure(figsize=(7.2, 3.8 if together else 2.1 * count + 0.6), layout="constrained")
        panels = figure.subplots(count, 1, squeeze=False)[:, 0]
        lowest, highest = [], []
        for axes, (name, look) in zip(cycle(panels), _looks(losses), strict=False):
            elbo = -losses[name].astype(float)
            window = max(1, len(elbo) // 50)
            smooth = np.convolve(elbo, np.ones(window) / window, mode="valid")
            shown = np.unique(np.linspace(0, len(smooth) - 1, _POINTS).astype(int))
            axes.plot(shown + window, smooth[shown], **look, lw=1.6, ms=5, markevery=max(1, len(shown) // _MARKS))
            low, high = settled_range(smooth)
            lowest.append(low)
            highest.append(high)
            axes.set(ylabel="ELBO (nats)", ylim=(min(lowest), max(highest)) if together else (low, high))
        panels[-1].set_xlabel("step")
        figure.legend(loc="outside lower center", ncols=_COLUMNS, fontsize=9)
        return as_svg(figure)


def intervals(found: Mapping[str, Mapping[str, np.ndarray]], names: Any) -> str:
    """A panel a latent: of each fit that has it the mean and the 90 % interval of its draws, {latent: {fit: (S,)}}."""
    with rc_context(STYLE):
        columns = min(_COLUMNS, len(found))
        rows, looks = -(-len(found) // columns), dict(_looks(names))
        figure = Figure(figsize=(7.2, rows * (0.85 + 0.2 * len(looks)) + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (latent, fits) in zip(grid.flat, found.items(), strict=False):
            for place, (name, look) in enumerate(looks.items()):
                if name in fits:
                    low, high = np.quantile(fits[name], [0.05, 0.95])
                    axes.plot([low, high], [place, place], color=look["color"], ls=look["ls"], lw=1.6)
                    axes.plot(fits[name].mean(), place, look["marker"], color=look["color"], ms=5)
            axes.set_title(short(latent), fontsize=9)
            axes.margins(x=0.12)
            axes.set(ylim=(len(looks) - 0.3, -0.7), yticks=[])
            axes.grid(axis="x", color=GREY, alpha=0.25)
            axes.spines["left"].set_visible(False)
            axes.tick_params(labelsize=8)
            axes.locator_params(axis="x", nbins=4)
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
        marks = [Line2D([], [], **look) for look in looks.values()]
        figure.legend(handles=marks, loc="outside lower center", ncols=_COLUMNS, fontsize=9)
        return as_svg(figure)


def coverage_curves(pits: Mapping[str, np.ndarray]) -> str:
    """The share of held-out rows inside the central interval of each probability, by fit, from PIT values (N,)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, label="as it should be")
        grid = np.linspace(0, 1, 201)
        for name, look in _looks(pits):
            inside = np.searchsorted(np.sort(2 * np.abs(pits[name] - 0.5)), grid, side="right") / len(pits[name])
            axes.plot(grid, inside, **look, lw=1.6, ms=5, markevery=len(grid) // _MARKS)
        axes.set(xlabel="probability of the interval", ylabel="share of rows inside", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend(loc="upper left", fontsize=9)
        return as_svg(figure)


def reliability_curves(found: Mapping[str, Reliability]) -> str:
    """The share of right answers against the probability given to them, by fit, with ± 2 standard errors."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, label="probability = share right")
        for name, look in _looks(found):
            confidence, right, error = (
                v.numpy() for v in (found[name].confidence, found[name].right, found[name].standard_error)
            )
            axes.errorbar(confidence, right, 2 * error, **look, lw=1.4, ms=5, capsize=3)
        axes.set(xlabel="probability of the predicted class", ylabel="share right", ylim=(-0.03, 1.03))
        axes.set_xlim(min(0.5, *(float(r.confidence.min()) - 0.05 for r in found.values())), 1.03)
        axes.legend(loc="upper left", fontsize=9)
        return as_svg(figure)
