"""Colours and style of all figures, and figures as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "INK", "ORANGE", "STYLE", "Axes", "Figure", "as_svg", "drawn"]

INK, BLUE, ORANGE, GREY = "#1a1a1a", "#2b6cb0", "#c2570c", "#8a8a8a"


STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "text.parse_math": False,
}


_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # a name may have such, a file may not


def as_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    return _NO_XML.sub("\ufffd", stream.getvalue())


def drawn(draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    """Return the SVG text of a figure of ``size`` inches with one axes that ``draw`` fills."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return as_svg(figure)
