"""The report's figures: each draws one thing and returns it as SVG text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.predictive.prediction import ClassPrediction, Prediction
from inference.reporting.figures.style import BLUE, GREY, INK, ORANGE, STYLE, as_svg

__all__ = [
    "class_entropy",
    "elbo_curve",
    "functions",
    "marginals",
    "observed_vs_predicted",
    "predictive_check",
    "settled_range",
    "short",
]


def _panel(width: float = 7.2, height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def elbo_curve(losses: np.ndarray, kl: np.ndarray) -> str:
    """The ELBO (+, in nats) by step, the means of its last two quarters, and below it its parts.

    Every step is faint, with a running mean on top.
    """
    elbo, divergence = -np.asarray(losses, dtype=float), np.asarray(kl, dtype=float)
    whole = np.isfinite(divergence).all()
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.8 if whole else 3.4), layout="constrained")
        panels = figure.subplots(2 if whole else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + whole])
        _curve(panels[0, 0], elbo, (BLUE, ORANGE), "one step", "mean of {} steps")
        _mark_quarters(panels[0, 0], elbo)
        panels[0, 0].set(ylabel="ELBO (nats)")
        if whole:
            _curve(panels[1, 0], elbo + divergence, (BLUE, BLUE), None, "log likelihood")
            twin = panels[1, 0].twinx()
            _curve(twin, divergence, (GREY, INK), None, "KL")
            panels[1, 0].set_ylabel("log likelihood", color=BLUE)
            twin.set_ylabel("KL, guide to prior", color=INK)
            twin.spines["right"].set_visible(True)
        panels[-1, 0].set_xlabel("step")
        entries = panels[0, 0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=4, fontsize=9)
        return as_svg(figure)


def _curve(axes: Axes, values: np.ndarray, colours: tuple[str, str], faint: str | None, bold: str) -> None:
    steps = np.arange(1, len(values) + 1)
    shown = slice(None, None, max(1, len(values) // 2000))
    window = max(1, len(values) // 50)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps[shown], values[shown], color=colours[0], alpha=0.25, lw=0.6)
    axes.plot([], [], color=colours[0], alpha=0.7, lw=1, label=faint)
    axes.plot(steps[window - 1 :][shown], smooth[shown], color=colours[1], lw=1.6, label=bold.format(window))
    axes.set_ylim(*settled_range(values))


def settled_range(values: np.ndarray) -> tuple[float, float]:
    """Return the range of a curve after its first steps, with a margin."""
    low, high = np.quantile(values[len(values) // 20 :], [0.002, 0.999])
    return _padded(float(low), float(high))


def _mark_quarters(axes: Axes, elbo: np.ndarray) -> None:
    """The last quarter of the steps and the one before.

    :func:`~inference.optim.convergence.convergence` compares the two.
    """
    window = len(elbo) // 4
    if not window:
        return
    spans = ((len(elbo) - 2 * window, 0.12, ":", "quarter before"), (len(elbo) - window, 0.3, "--", "last quarter"))
    for start, shade, dashes, name in spans:
        ends = (start + 1, start + window)
        axes.axvspan(*ends, color=GREY, alpha=shade, lw=0)
        axes.hlines(elbo[start : start + window].mean(), *ends, color=INK, lw=2, ls=dashes, label=f"mean, {name}")
        axes.annotate(
            name, (sum(ends) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8
        )


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 1.0
    return low - pad, high + pad


def marginals(posterior: Mapping[str, np.ndarray], prior: Mapping[str, np.ndarray]) -> str:
    """One small panel a quantity: posterior draws filled, prior draws as an outline."""
    with rc_context(STYLE):
        columns = min(4, len(posterior))
        rows = -(-len(posterior) // columns)
        figure = Figure(figsize=(7.2, 1.65 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (name, draws) in zip(grid.flat, posterior.items(), strict=False):
            _marginal(axes, draws, prior.get(name))
            axes.set_title(short(name), fontsize=9)
        for axes in grid.flat[len(posterior) :]:
            axes.set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return as_svg(figure)


def short(name: str, length: int = 24) -> str:
    """The name, cut where it is longer than a panel is wide."""
    return name if len(name) <= length else name[: length - 1] + "…"


def _marginal(axes: Axes, draws: np.ndarray, prior: np.ndarray | None) -> None:
    everything = draws if prior is None else np.concatenate([draws, np.quantile(prior, [0.02, 0.98])])
    low, high = float(everything.min()), float(everything.max())
    bins = np.linspace(*_padded(low, high), 60).tolist()
    if np.ptp(draws) > 1e-6 * (high - low):
        axes.hist(draws, bins=bins, density=True, color=BLUE, alpha=0.65, label="posterior")
    else:
        axes.axvline(draws[0], color=BLUE, lw=2, label="posterior")
    if prior is not None:
        axes.hist(prior, bins=bins, density=True, histtype="step", color=ORANGE, lw=1.2, label="prior")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelsize=8)


def predictive_check(observed: np.ndarray, replicated: np.ndarray, label: str) -> str:
    """The distribution of the data, over those of data sets that the fitted model makes, shape (S, N)."""
    with rc_context(STYLE):
        figure, axes = _panel()
        edges = _bin_edges(observed, replicated)
        counts = np.stack([np.histogram(row, edges, density=True)[0] for row in replicated])
        band = np.quantile(counts, [0.05, 0.95], axis=0)
        below, above = np.c_[band, band[:, -1:]]
        axes.fill_between(edges, below, above, step="post", color=BLUE, alpha=0.25, label="90 % of replications")
        axes.stairs(counts.mean(0), edges, color=BLUE, lw=1.4, label="mean of replications")
        axes.hist(observed, bins=edges.tolist(), density=True, histtype="step", color=INK, lw=1.6, label="data")
        axes.set(xlabel=label, ylabel="density")
        axes.legend()
        return as_svg(figure)


def _bin_edges(observed: np.ndarray, replicated: np.ndarray) -> np.ndarray:
    """Even bins over both; one for each value where they are counts."""
    low, high = np.quantile(replicated, [0.002, 0.998])
    low, high = min(low, observed.min()), max(high, observed.max())
    whole = np.array_equal(observed, np.round(observed)) and np.array_equal(replicated, np.round(replicated))
    if whole and high - low <= 60:
        return np.arange(np.floor(low), np.ceil(high) + 2) - 0.5
    return np.linspace(*_padded(low, high), min(40, 8 + int(2 * observed.size**0.5)) + 1)


def functions(
    x: np.ndarray, prediction: Prediction, data: tuple[np.ndarray, np.ndarray], names: tuple[str, str]
) -> str:
    """Draws of the function over one input, with the interval for new observations and the data."""
    with rc_context(STYLE):
        figure, axes = _panel(height=4.0)
        lower, upper = prediction.interval(0.9)
        axes.fill_between(x, lower, upper, color=BLUE, alpha=0.18, label="90 % interval for a new observation")
        axes.plot(x, prediction.draws[:50].T, color=BLUE, lw=0.5, alpha=0.35)
        axes.plot([], [], color=BLUE, lw=0.8, label="draws of the function")
        axes.plot(x, prediction.mean, color=ORANGE, lw=2, label="mean")
        axes.scatter(*data, s=14, color=INK, zorder=3, label="data", rasterized=len(data[0]) > 2000)
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.legend(loc="best", fontsize=9)
        return as_svg(figure)


def observed_vs_predicted(prediction: Prediction, observed: np.ndarray, label: str) -> str:
    """Each row's predicted mean and 90 % interval against what was observed."""
    with rc_context(STYLE):
        figure, axes = _panel(height=4.4)
        shown = np.linspace(0, len(observed) - 1, min(400, len(observed))).astype(int)
        lower, upper = (end.numpy()[shown] for end in prediction.interval(0.9))
        y, mean = observed[shown], prediction.mean.numpy()[shown]
        inside = (lower <= y) & (y <= upper)
        for mask, colour, marker, text in (
            (inside, BLUE, "o", "inside its interval"),
            (~inside, ORANGE, "D", "outside"),
        ):
            axes.vlines(mean[mask], lower[mask], upper[mask], color=colour, alpha=0.25, lw=1)
            axes.plot(mean[mask], y[mask], marker, ms=4.5, color=colour, label=text)
        ends = _padded(min(mean.min(), y.min()), max(mean.max(), y.max()))
        axes.plot(ends, ends, color=GREY, lw=1, ls="--", label="predicted = observed")
        axes.set(xlabel=f"predicted {label}, with 90 % interval", ylabel=f"observed {label}")
        axes.legend(fontsize=9)
        return as_svg(figure)


def class_entropy(prediction: ClassPrediction, observed: np.ndarray) -> str:
    """Predictive entropy of rows that were predicted rightly and wrongly."""
    with rc_context(STYLE):
        figure, axes = _panel()
        entropy, right = prediction.entropy.numpy(), prediction.labels.numpy() == observed
        bins = np.linspace(0, max(float(entropy.max()), 1e-3), 40).tolist()
        axes.hist(entropy[right], bins=bins, density=True, color=BLUE, alpha=0.6, label=f"right ({right.sum()})")
        if (~right).any():
            axes.hist(
                entropy[~right],
                bins=bins,
                density=True,
                histtype="step",
                color=ORANGE,
                lw=1.8,
                label=f"wrong ({(~right).sum()})",
            )
        axes.set(xlabel="predictive entropy (nats)", ylabel="density")
        axes.legend()
        return as_svg(figure)
