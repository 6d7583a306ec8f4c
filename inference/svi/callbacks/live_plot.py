"""Plot of the ELBO of a fit while it runs: in a notebook, in a file, or as a line in the terminal."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from inference.reporting.figures.style import BLUE, GREY, INK, ORANGE, STYLE
from inference.storage.atomic_files import make_folder, replacing
from inference.svi.callbacks.base import CHUNK, Progress
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
    """Means of −ELBO and KL between calls, of one restart."""

    step: list[int] = field(default_factory=list)
    means: list[tuple[float, float]] = field(default_factory=list)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return steps, −ELBO and KL, thinned to what a figure can show, with the last step."""
        kept = np.unique(np.linspace(0, len(self.step) - 1, min(_SHOWN, len(self.step))).astype(int))
        loss, kl = np.array(self.means)[kept].T
        return np.array(self.step)[kept], loss, kl


class Display(Protocol):
    """Place that shows a picture or a line of text, and makes only what it shows."""

    def show(self, png: Callable[[], bytes], line: Callable[[], str]) -> None:
        """Replace what is shown."""

    def close(self) -> None:
        """Release the place; what it shows stays."""


class Notebook:
    """Output of the notebook cell that runs; the picture is written to ``path`` too, if given."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else File(path)
        self._handle: Any = None

    def show(self, png: Callable[[], bytes], line: Callable[[], str]) -> None:
        """Replace the picture in place."""
        from IPython.display import Image, display

        data = png()
        image = Image(data=data, format="png", alt=line())
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
        if self._file is not None:
            self._file.show(lambda: data, line)

    def close(self) -> None:
        """Do nothing: the picture stays."""


class File:
    """PNG file, which is complete at any time."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._path = path

    def show(self, png: Callable[[], bytes], line: Callable[[], str]) -> None:
        """Replace the file."""
        with replacing(self._path) as partial:
            partial.write_bytes(png())

    def close(self) -> None:
        """Do nothing: the file stays."""


class Terminal:
    """Line on standard error, above the progress bars that begin later."""

    def __init__(self) -> None:
        self._line: tqdm[Any] = tqdm(bar_format="{desc}", desc=" ")

    def show(self, png: Callable[[], bytes], line: Callable[[], str]) -> None:
        """Replace the line."""
        self._line.set_description_str(line())

    def close(self) -> None:
        """Move the cursor below the line."""
        self._line.close()


def display_for(path: Path | None) -> Display:
    """Return the notebook if this is one, else the file at ``path``, else the terminal.

    Raises
    ------
    OSError
        If the folder of ``path`` cannot be written.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        return Notebook(path)
    return Terminal() if path is None else File(path)


class LivePlot:
    """Callback that draws the ELBO by step, and its two parts, while the fit runs.

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
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x, guide, plot = torch.linspace(-1, 1, 20).reshape(-1, 1), mean_field_normal(linear_regression), kiln.LivePlot()
    >>> _ = kiln.fit(linear_regression, guide, x, x[:, 0], steps=300, callbacks=[plot], progress=False)
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
        self._display: Display | None = None
        self._cost, self._due, self._stale = _FIRST_COST, 0.0, False

    def __enter__(self) -> LivePlot:
        self._display = display_for(self.path)
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
        if self._display is not None:
            self._display.close()
            self._display = None

    def _wait(self, seconds: float) -> None:
        self._due = seconds + max(_LEAST, _SHARE * self._cost)

    def _draw(self) -> None:
        begun = time.perf_counter()
        if self._display is not None:
            self._display.show(self.png, lambda: f"{self.blocks} {self.title}")
        self._cost, self._stale = time.perf_counter() - begun, False

    @property
    def title(self) -> str:
        """Text with the step, and the ELBO or the loss there."""
        restart, curve = list(self._curves.items())[-1]
        name, value = ("loss", curve.means[-1][0]) if self.loss else ("ELBO", -curve.means[-1][0])
        which = f", start {restart}" if len(self._curves) > 1 else ""
        return f"step {curve.step[-1]:,} of {self._steps:,}{which}: {name} {value:.5g} nats"

    @property
    def blocks(self) -> str:
        """Latest curve as a line of forty blocks, whose scale leaves out its first twentieth."""
        _, loss, _ = list(self._curves.values())[-1].arrays()
        value = np.array([part.mean() for part in np.array_split(loss if self.loss else -loss, min(40, len(loss)))])
        low, high = _range(value)
        return "".join(_BARS[int(level)] for level in np.clip((value - low) / ((high - low) or 1) * 7.99, 0, 7))

    def figure(self) -> Figure:
        """Draw the figure of the steps so far."""
        last = list(self._curves)[-1]
        latest = self._curves[last]
        with rc_context(STYLE):
            parts = not np.isnan(latest.means[-1][1])
            figure = Figure(figsize=(8.6 if parts else 4.6, 3.2))
            figure.subplots_adjust(left=0.1 if parts else 0.17, right=0.98, bottom=0.16, top=0.89, wspace=0.25)
            panels = figure.subplots(1, 2 if parts else 1, squeeze=False)[0]
            for restart, curve in self._curves.items():
                steps, loss, kl = curve.arrays()
                colour, width, alpha = (BLUE, 1.3, 1.0) if restart == last else (GREY, 0.8, 0.6)
                value = loss if self.loss else -loss
                panels[0].plot(steps, value, color=colour, lw=width, alpha=alpha)
            _frame(panels[0], [value], "−ELBO (nats)" if self.loss else "ELBO (nats)")
            if parts:
                panels[1].plot(steps, loss - kl, color=BLUE, lw=1.3, label="−E log p(x | z)")
                panels[1].plot(steps, kl, color=ORANGE, lw=1.3, label="KL(q ‖ p(z))")
                _frame(panels[1], [loss - kl, kl], "parts of −ELBO (nats)")
                panels[1].legend(fontsize=9)
            figure.suptitle(self.title, fontsize=10, color=INK)
        return figure

    def png(self) -> bytes:
        """Return the figure as a PNG picture."""
        stream = io.BytesIO()
        self.figure().savefig(stream, format="png", dpi=_DPI)
        return stream.getvalue()


def _frame(axes: Axes, curves: Sequence[np.ndarray], ylabel: str) -> None:
    """Set the labels of the axes, and limits that show these curves."""
    ranges = [_range(values) for values in curves]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    pad = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - pad, high + pad)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.locator_params(axis="x", nbins=6)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the least and the largest value after the first twentieth, where a fit is still far off."""
    settled = values[len(values) // 20 :]
    return float(settled.min()), float(settled.max())
