"""What a report says of each observation, left out in turn: how probable the others make it."""

from __future__ import annotations

from inference.diagnostics.importance_sampling import LeaveOneOut
from inference.reporting.figures.importance_plots import left_out_dots
from inference.reporting.section import Section

__all__ = ["loo_section"]


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
    return Section("Which observations surprise it?", reading, left_out_dots(found), rows, figure_label=label)
