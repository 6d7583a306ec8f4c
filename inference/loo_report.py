"""What a report says of each observation, left out in turn: how probable the others make it."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.figures import BLUE, GREY, INK, ORANGE, STYLE, as_svg
from inference.leave_one_out import LeaveOneOut
from inference.sections import Section

__all__ = ["loo_section"]

_NAMED = 3  # observations whose numbers the figure shows


def loo_section(found: LeaveOneOut) -> Section:
    """The estimate with its errors, and how surprising and how well known each observation is."""
    count, doubtful = found.pareto_k.size, len(found.doubtful)
    known = "all of them are well known" if not doubtful else f"{doubtful:,} of them are not well known (orange)"
    reading = (
        "How probable each observation is under the posterior of all the others, found without fitting again: the "
        "lower a dot on the left, the more the observation surprises the model; the numbers are the rows', from 0. "
        "The sum compares models on the same observations: more is better. On the right, how well each is known: "
        f"{known}, which is the case below the dashed line."
    )
    rows = [
        ("sum over observations (elpd), nats", f"{found.elpd:.2f} ± {found.se:.2f}"),
        ("of which error of the draws", f"{found.mcse:.2f}"),
        ("parameters that the observations pay for (p_loo)", f"{found.p_loo:.2f}"),
        ("observations", f"{count:,}"),
        ("of which not well known", f"{doubtful:,}"),
    ]
    label = "log probability of each observation given the others, and its Pareto k"
    return Section("Which observations surprise it?", reading, _figure(found), rows, figure_label=label)


def _figure(found: LeaveOneOut) -> str:
    elpd, k = found.pointwise.reshape(-1), found.pareto_k.reshape(-1)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        good = k < found.threshold
        _dots(left, elpd, good)
        _dots(right, np.minimum(k, 2.0), good)
        for i in np.argsort(elpd)[:_NAMED]:
            left.annotate(f"{i:,}", (i, elpd[i]), (5, 0), textcoords="offset points", va="center", fontsize=9)
        right.axhline(found.threshold, color=INK, lw=1.4, ls="--", label=f"limit {found.threshold:.2f}")
        right.legend(loc="best", fontsize=9)
        left.set(xlabel="observation", ylabel="log probability, left out (nats)")
        right.set(xlabel="observation", ylabel="Pareto k (2 or more: drawn at 2)")
        return as_svg(figure)


def _dots(axes: Axes, values: np.ndarray, good: np.ndarray) -> None:
    rows = np.arange(len(values))
    axes.axhline(float(np.median(values)), color=GREY, lw=0.8)
    for mask, colour, marker in ((good, BLUE, "o"), (~good, ORANGE, "D")):
        axes.plot(rows[mask], values[mask], marker, color=colour, ms=3.5, alpha=0.8)
    axes.margins(x=0.06)
