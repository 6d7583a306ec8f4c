"""The ELBO of a fit, drawn while it runs."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.reporting.figures.style import BLUE, GREY, INK, ORANGE, STYLE
from inference.svi.callbacks.base import CHUNK, Progress
from inference.svi.callbacks.display import Display, display_for
from inference.utils.validation import positive_integer

__all__ = ["LivePlot"]

_SHARE = 50  # of the time is for the fit, to one for drawing
_LEAST = 0.25  # seconds between two drawings
_FIRST_COST = 0.02  # seconds, before one is known
_SHOWN = 1000  # points of a curve
_DPI = 110
_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class _Curve:
    """Means of −ELBO and KL between calls, of one start."""

    step: list[int] = field(default_factory=list)
    means: list[tuple[float, float]] = field(default_factory=list)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, −ELBO and KL, thinned to what a figure can show; the last is always there."""
        kept = np.unique(np.linspace(0, len(self.step) - 1, min(_SHOWN, len(self.step))).astype(int))
        loss, kl = np.array(self.means)[kept].T
        return np.array(self.step)[kept], loss, kl


class LivePlot:
    """A callback that draws the ELBO by step, and its two parts, while the fit runs.

    In a notebook the figure changes in place; elsewhere it is rewritten at
    ``path``, or without one shown as a line of blocks in the terminal. Drawing
    waits until the fit has run for fifty times as long as the last drawing
    took, so it takes at most 2 % of a long fit, and is done once more at the end.

    Parameters
    ----------
    every
        Steps that are averaged in one point of the curves.
    path
        A PNG to rewrite, whole at any time; in a notebook too.
    loss
        Show −ELBO.

    Raises
    ------
    OSError
        Before the fit starts, if ``path`` cannot be written.

    Examples
    --------
    >>> import torch
    >>> from guides import mean_field_normal
    >>> from inference import LivePlot, fit
    >>> from ppl_models import linear_regression
    >>> x, guide, plot = torch.linspace(-1, 1, 20).reshape(-1, 1), mean_field_normal(linear_regression), LivePlot()
    >>> _ = fit(linear_regression, guide, x, x[:, 0], steps=300, callbacks=[plot], progress=False)
    >>> [axes.get_ylabel() for axes in plot.figure().axes]
    ['ELBO (nats)', 'parts of −ELBO (nats)']
    """

    only_looks = True

    def __init__(self, every: int = CHUNK, path: str | Path | None = None, *, loss: bool = False) -> None:
        self.every = positive_integer(every, "every")
        self.path = None if path is None else Path(path)
        self.loss = loss
        self._curves: dict[int, _Curve] = {}
        self._steps = 0
        self._screen: Display | None = None
        self._cost, self._due, self._stale = _FIRST_COST, 0.0, False

    def __enter__(self) -> LivePlot:
        self._screen = display_for(self.path)
        self._curves = {}
        return self

    def __call__(self, now: Progress) -> None:
        """Add a point, and draw if it is time."""
        if now.start not in self._curves:
            self._curves[now.start] = _Curve()
            self._wait(0.0)
        curve = self._curves[now.start]
        curve.step.append(now.step)
        curve.means.append(now.means)
        self._steps, self._stale = now.steps, True
        if now.seconds >= self._due:
            self._draw()
            self._wait(now.seconds + self._cost)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stale:
            self._draw()
        if self._screen is not None:
            self._screen.close()
            self._screen = None

    def _wait(self, seconds: float) -> None:
        self._due = seconds + max(_LEAST, _SHARE * self._cost)

    def _draw(self) -> None:
        begun = time.perf_counter()
        if self._screen is not None:
            self._screen.show(self.png, lambda: f"{self.blocks} {self.title}")
        self._cost, self._stale = time.perf_counter() - begun, False

    @property
    def title(self) -> str:
        """The step, and the ELBO or the loss there."""
        start, curve = list(self._curves.items())[-1]
        name, value = ("loss", curve.means[-1][0]) if self.loss else ("ELBO", -curve.means[-1][0])
        which = f", start {start}" if len(self._curves) > 1 else ""
        return f"step {curve.step[-1]:,} of {self._steps:,}{which}: {name} {value:.5g} nats"

    @property
    def blocks(self) -> str:
        """The latest curve as a line of forty blocks, which leaves its first twentieth out of the scale."""
        _, loss, _ = list(self._curves.values())[-1].arrays()
        value = np.array([part.mean() for part in np.array_split(loss if self.loss else -loss, min(40, len(loss)))])
        low, high = _range(value)
        return "".join(_BARS[int(level)] for level in np.clip((value - low) / ((high - low) or 1) * 7.99, 0, 7))

    def figure(self) -> Figure:
        """The figure as it is now."""
        with rc_context(STYLE):
            parts = not np.isnan(list(self._curves.values())[-1].means[-1][1])
            figure = Figure(figsize=(8.6 if parts else 4.6, 3.2))
            figure.subplots_adjust(left=0.1 if parts else 0.17, right=0.98, bottom=0.16, top=0.89, wspace=0.25)
            panels = figure.subplots(1, 2 if parts else 1, squeeze=False)[0]
            for number, curve in self._curves.items():
                _value(panels[0], curve, self.loss, number == list(self._curves)[-1])
            if parts:
                _parts(panels[1], list(self._curves.values())[-1])
            figure.suptitle(self.title, fontsize=10, color=INK)
        return figure

    def png(self) -> bytes:
        """The figure as a picture."""
        stream = io.BytesIO()
        self.figure().savefig(stream, format="png", dpi=_DPI)
        return stream.getvalue()


def _value(axes: Axes, curve: _Curve, loss: bool, latest: bool) -> None:
    steps, values, _ = curve.arrays()
    values = values if loss else -values
    axes.plot(steps, values, color=BLUE if latest else GREY, lw=1.3 if latest else 0.8, alpha=1 if latest else 0.6)
    if latest:
        low, high = _range(values)
        pad = 0.06 * (high - low) or 1.0
        axes.set_ylim(low - pad, high + pad)
    axes.set(xlabel="step", ylabel="−ELBO (nats)" if loss else "ELBO (nats)")
    axes.locator_params(axis="x", nbins=6)


def _parts(axes: Axes, curve: _Curve) -> None:
    steps, loss, kl = curve.arrays()
    shown = {"−E log p(x | z)": (loss - kl, BLUE), "KL(q ‖ p(z))": (kl, ORANGE)}
    for label, (values, colour) in shown.items():
        axes.plot(steps, values, color=colour, lw=1.3, label=label)
    ranges = [_range(values) for values, _ in shown.values()]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    pad = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - pad, high + pad)
    axes.set(xlabel="step", ylabel="parts of −ELBO (nats)")
    axes.locator_params(axis="x", nbins=6)
    axes.legend(fontsize=9)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Least and largest, but for the first twentieth, where a fit falls from far off."""
    settled = values[len(values) // 20 :]
    return float(settled.min()), float(settled.max())
