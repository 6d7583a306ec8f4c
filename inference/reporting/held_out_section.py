"""Sections on rows that the fit never saw, and on each row of the fit as if it had not been seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from inference.diagnostics.importance_sampling import LeaveOneOut
from inference.diagnostics.uniformity_tests import Shape, ecdf_p_value, thresholds
from inference.predictive.prediction import Prediction
from inference.predictive.scoring import ClassScores, HeldOut, Reliability, Scores
from inference.reporting.figures import diagnostic_plots, posterior_plots
from inference.reporting.figures.diagnostic_plots import left_out_dots
from inference.reporting.section import Labels, Section

__all__ = ["held_out_sections", "loo_section"]

ERROR_RATE = 0.01


def held_out_sections(held_out: HeldOut, baselines: Mapping[str, float], names: Labels) -> Iterator[Section]:
    """The sections of an evaluation, the RMSE of other methods among its scores."""
    prediction, scores = held_out.prediction, held_out.scores
    rows = [*_score_rows(scores), *((f"RMSE of {n}, same rows", f"{v:.4g}") for n, v in baselines.items())]
    reading, picture = "On rows the fit never saw.", None
    if isinstance(prediction, Prediction):
        reading = (
            "On rows the fit never saw: the closer to the dashed line the better the prediction, and about nine in ten "
            "points should lie inside their interval."
        )
        label = names.target or prediction.site
        picture = posterior_plots.observed_vs_predicted(prediction, held_out.observed.numpy(), label)
    yield Section("How good are its predictions?", reading, picture, rows, figure_label="observed against predicted")
    if isinstance(scores, ClassScores):
        yield _reliability(scores.reliability)
    else:
        yield _pit(scores.pit.numpy())
        yield _coverage(scores)


def _score_rows(scores: Scores | ClassScores) -> list[tuple[str, str]]:
    rows = [("held-out rows", str(scores.rows))]
    if isinstance(scores, ClassScores):
        rows.append(("share predicted rightly", f"{scores.accuracy:.3f}"))
        if scores.error_auroc is not None:
            told = "how well entropy tells wrong from right (AUROC: 0.5 not at all, 1 always)"
            rows.append((told, f"{scores.error_auroc:.3f}"))
        rows.append(("Brier score of the probabilities (0 is best, 2 worst)", f"{scores.brier:.3f}"))
        rows.append(("expected calibration error, of probabilities", f"{scores.calibration_error:.3f}"))
    else:
        rows.append(("RMSE, in units of the target", f"{scores.rmse:.4g}"))
        rows.append(("CRPS, in units of the target", f"{scores.crps:.4g}"))
        for c in scores.coverage:
            share = f"{c.share:.1%} (should be {c.prob:.0%} ± {2 * c.standard_error:.0%})"
            rows.append((f"rows inside their {c.prob:.0%} interval", share))
    return [*rows, ("mean log likelihood, nats a row", f"{scores.log_likelihood:.3f}")]


def _pit(pit: np.ndarray) -> Section:
    if ecdf_p_value(pit, thresholds()) >= ERROR_RATE:
        seen = "they are, as far as these rows can tell"
    else:
        seen = f"they are not: predictions are {' and '.join(Shape.of(pit).words) or 'of another shape'}"
    reading = (
        "How many draws of its prediction lie below each observation: where predictions are as sure as they should be, "
        f"the bars are even, within the grey band; here {seen}."
    )
    picture = diagnostic_plots.pit_histogram(pit)
    return Section("Are predictions as sure as they should be?", reading, picture, figure_label="PIT histogram")


def _coverage(scores: Scores) -> Section:
    off = [c for c in scores.coverage if abs(c.share - c.prob) > 2 * c.standard_error]
    seen = ", ".join(f"the {c.prob:.0%} interval holds {c.share:.0%}" for c in off)
    reading = (
        "The share of rows inside the central interval of each probability, which should be that probability, on the "
        f"dashed line; here {seen or 'all four named ones hold theirs, within two standard errors'}."
    )
    picture = diagnostic_plots.coverage_curve(scores.pit.numpy(), scores.coverage)
    return Section("Do its intervals hold what they promise?", reading, picture, figure_label="coverage by probability")


def _reliability(found: Reliability) -> Section:
    if abs(found.excess) <= 2 * found.excess_se:
        seen = "on average they are neither too high nor too low"
    else:
        seen = f"on average they are too {'high' if found.excess > 0 else 'low'}, by {abs(found.excess):.1%}"
    reading = (
        "How often the predicted class is right, by the probability given to it: points on the dashed line mean that "
        f"probabilities can be taken at their word; here {seen}."
    )
    picture = diagnostic_plots.reliability_diagram(found)
    return Section("Can its probabilities be believed?", reading, picture, figure_label="reliability diagram")


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
