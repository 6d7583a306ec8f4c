"""Sections on trust in a fit: each check explained, with the figure of what it was seen from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from inference.diagnostics.checks import Diagnosis, Evidence, Topic
from inference.diagnostics.importance_sampling import Moments
from inference.diagnostics.verdict import Explained, explain
from inference.reporting.figures import diagnostic_plots
from inference.reporting.figures.posterior_plots import elbo_curve
from inference.reporting.section import Section

__all__ = ["trust_sections"]


def trust_sections(diagnosis: Diagnosis, losses: np.ndarray, kl: np.ndarray) -> Iterator[Section]:
    """A heading with the count of what passed, then steps, weights and moments, each with its checks and its figure."""
    checks = [explain(check) for check in diagnosis.checks]
    counts = ((word, sum(check.word == word for check in checks)) for word in ("passed", "failed", "cannot be checked"))
    reading = ", ".join(f"{count} {word}" for word, count in counts if count)
    yield Section("Can this fit be trusted?", f"Of {len(checks)} checks: {reading}.")
    by_topic = {topic: [check for check in checks if check.topic is topic] for topic in Topic}
    yield _steps(losses, kl, by_topic[Topic.STEPS])
    if by_topic[Topic.WEIGHTS]:
        yield _weights(diagnosis.evidence, diagnosis.khat_threshold, by_topic[Topic.WEIGHTS])
    if by_topic[Topic.MOMENTS] and diagnosis.evidence is not None and diagnosis.evidence.moments is not None:
        yield _moments(diagnosis.evidence.moments, by_topic[Topic.MOMENTS])


def _steps(losses: np.ndarray, kl: np.ndarray, checks: Sequence[Explained]) -> Section:
    reading = (
        "The evidence lower bound (ELBO), which fitting pushes up: a curve that is flat at its right end has settled, "
        "one that still climbs wants more steps. It is the log likelihood of the data, less the KL divergence between "
        "guide and prior, which is what the latents cost."
    )
    label = "ELBO by step, with the means of its last two quarters, and its two parts"
    return Section("Did the fit settle?", reading, elbo_curve(losses, kl), figure_label=label, checks=checks, level=3)


def _weights(evidence: Evidence | None, limit: float | None, checks: Sequence[Explained]) -> Section:
    title = "Does the guide cover the posterior?"
    if evidence is None or limit is None:
        return Section(title, "This cannot be seen from inside the fit.", checks=checks, level=3)
    reading = (
        "Each draw of the guide has a weight, how much more probable it is under the posterior. Left, the share of all "
        "weight that the heaviest draws carry: near the dashed line many draws count, far above it a few stand for all "
        f"the others. Right, Pareto k-hat of {len(evidence.khats)} sets of draws, which should lie left of the limit."
    )
    picture = diagnostic_plots.weights(evidence, limit)
    return Section(
        title, reading, picture, figure_label="share of the heaviest weights, and k-hat", checks=checks, level=3
    )


def _moments(moments: Moments, checks: Sequence[Explained]) -> Section:
    reading = (
        "The guide beside the posterior, as the guide's own weights correct it: a dot an unknown with ± 2 standard "
        "errors, which should lie in the grey band. Left, its mean, where 0 is right; right, its standard deviation, "
        "where 1 is right and less is too sure."
    )
    shown = diagnostic_plots.worst_first(moments)
    if len(shown) < len(moments.names):
        reading += f" The worst {len(shown)} of {len(moments.names):,} unknowns; the others are better."
    picture = diagnostic_plots.moments(moments, shown)
    title, label = (
        "Are its means and spreads right?",
        "means and standard deviations of the guide against the posterior's",
    )
    return Section(title, reading, picture, figure_label=label, checks=checks, level=3)
