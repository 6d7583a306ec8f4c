"""Two fits or more side by side in one HTML file: what each is, whether to rely on it, and where they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.arguments import row_count, sha256_of
from inference.diagnostics.checks import Diagnosis
from inference.diagnostics.verdict import verdict
from inference.model.sites import scalars
from inference.predictive.approximation import Approximation
from inference.predictive.autoencoder import EvidenceScores, HeldOutRows
from inference.predictive.importance_weights import diagnose
from inference.predictive.scoring import ClassScores, HeldOut, Scores
from inference.reporting.figures import comparison_plots
from inference.reporting.section import Labels, Section, provenance, write_page

__all__ = ["compare_report"]

MAX_PANELS, MAX_ROWS = 12, 40
_ELBO = "ELBO, nats"
_KINDS = {"good": "can be relied on", "bad": "not to be relied on yet", "open": "cannot be checked"}


@dataclass(frozen=True)
class _Fit:
    name: str
    posterior: Approximation
    diagnosis: Diagnosis
    held_out: HeldOut | HeldOutRows | None
    labels: Labels


def compare_report(
    path: str | Path,
    posteriors: Mapping[str, Approximation],
    *,
    held_out: Mapping[str, HeldOut | HeldOutRows] | None = None,
    labels: Mapping[str, Labels] | None = None,
    draws: int = 1000,
    progress: bool = True,
) -> Path:
    """Write one self-contained HTML file that compares ``posteriors``, by the names that the page gives them.

    Parameters
    ----------
    held_out
        By the same names, what :meth:`Posterior.evaluate` gave on rows that the fit never saw.
    labels
        By the same names, see :class:`Labels`: what each data set is called.
    draws
        Draws of each posterior behind the intervals.
    progress
        Show a bar while the fits are looked at.

    Raises
    ------
    ValueError
        If there are fewer than two posteriors, if something is given for a name
        that none has, or if a posterior was loaded without its data.
    """
    tests, named = held_out or {}, labels or {}
    if len(posteriors) < 2:
        raise ValueError(f"a comparison takes two fits or more, not {len(posteriors)}: posterior.report() shows one")
    unknown = sorted((tests.keys() | named.keys()) - posteriors.keys())
    if unknown:
        raise ValueError(f"there is no posterior named {unknown[0]!r}: give the names {sorted(posteriors)}")
    bar = tqdm(posteriors.items(), desc="compare", unit="fit", disable=not progress, leave=False)
    fits = [_Fit(name, p, diagnose(p), tests.get(name), named.get(name, Labels())) for name, p in bar]
    same = len({_of_data(fit.posterior.data) for fit in fits}) == 1
    tested = set()
    for held in (fit.held_out for fit in fits if fit.held_out is not None):
        inputs = held.inputs if isinstance(held, HeldOut) else ()
        tested.add(_of_data((held.observed, *(torch.as_tensor(np.asarray(value)) for value in inputs))))
    columns = [_facts(fit) | _scores(None if fit.held_out is None else fit.held_out.scores) for fit in fits]
    other = {} if same else {_ELBO: ", of different data"}
    rows = [
        [f"{name}{other.get(name, '')}", *(column.get(name, "–") for column in columns)]
        for name in dict.fromkeys(name for column in columns for name in column)
    ]
    warnings = []
    if not same:
        warnings.append("These fits saw different data: their ELBOs and posteriors are not comparable.")
    if len(tested) > 1:
        warnings.append("These fits were tested on different rows: their scores are not comparable.")
    return write_page(
        Path(path),
        "comparison.html",
        title=f"{len(fits)} fits compared",
        warnings=warnings,
        verdicts=[(fit.name, verdict(fit.diagnosis)) for fit in fits],
        head=["", *(fit.name for fit in fits)],
        rows=rows,
        sections=[_curves(fits, same), *_posteriors(fits, draws), *_calibration(fits, len(tested) < 2)],
        provenance=provenance([(f"seed of {fit.name}", str(fit.posterior.record.seed)) for fit in fits]),
    )


def _of_data(values: tuple[Any, ...]) -> str:
    """The fingerprint of the tensors among ``values``, whatever their precision."""
    tensors = [value.cpu() for value in values if isinstance(value, Tensor)]
    return sha256_of(*((v.float() if v.is_floating_point() else v.long()).numpy() for v in tensors))


def _facts(fit: _Fit) -> dict[str, str]:
    posterior, found = fit.posterior, fit.diagnosis
    outcome, rows = verdict(found), row_count(posterior.data)
    data = [fit.labels.data, "" if rows is None else f"{rows:,} rows"]
    if found.evidence is not None:  # the ELBO of the guide as it was found, from its weights
        elbo = _with_error(*found.evidence.elbo)
    else:
        last = -posterior.losses[-max(1, len(posterior.losses) // 4) :]
        error = float(last.std() / math.sqrt(len(last)))
        elbo = f"{_with_error(float(last.mean()), error)} (last quarter of the steps)"
    facts = {
        "Verdict": f"{outcome.sign} {_KINDS[outcome.kind]}",
        "Model": posterior.model_name,
        "Guide": f"{posterior.guide_name}, {posterior.bound_model.params.size:,} parameters",
        "Data": ", ".join(part for part in data if part),
        "Steps": f"{len(posterior.losses):,} of {posterior.record.options.get('optimizer')}",
        "Seconds of fitting": f"{posterior.record.seconds:.1f}",
        "Gradient evaluations": f"{posterior.record.evaluations:,}",
        _ELBO: elbo,
    }
    if found.evidence is not None:
        facts["Pareto k-hat"] = f"{found.khat:.2f} (limit {found.khat_threshold:.2f})"
        facts["Effective sample size"] = f"{found.ess:,.0f} of {found.evidence.log_weights.size:,}"
    return facts


def _with_error(value: float, error: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(2 * error))) if math.isfinite(error) and error > 0 else 2
    return f"{value:,.{digits}f} ± {2 * error:,.{digits}f}"


def _scores(scores: Scores | ClassScores | EvidenceScores | None) -> dict[str, str]:
    if scores is None:
        return {}
    rows = {"Held-out rows": f"{scores.rows:,}"}
    if isinstance(scores, EvidenceScores):
        bound = _with_error(scores.log_evidence, scores.standard_error)
        return rows | {
            "Held-out ELBO, nats a row": f"{scores.elbo:.2f}",
            "Held-out log p(x), at least, nats a row": bound,
        }
    if isinstance(scores, ClassScores):
        rows["Predicted rightly"] = f"{scores.accuracy:.1%}"
        rows["Brier score"] = f"{scores.brier:.3f}"
        rows["Calibration error"] = f"{scores.calibration_error:.3f}"
    else:
        rows["RMSE"] = f"{scores.rmse:.4g}"
        rows["CRPS"] = f"{scores.crps:.4g}"
        for c in scores.coverage:
            rows[f"Inside the {c.prob:.0%} interval"] = f"{c.share:.1%} ± {2 * c.standard_error:.1%}"
    return rows | {"Held-out log likelihood, nats a row": f"{scores.log_likelihood:.3f}"}


def _curves(fits: list[_Fit], same_data: bool) -> Section:
    reading = "The running mean of the ELBO of each fit, which fitting pushes up: higher is better, flat is settled."
    if not same_data:
        reading = "The running mean of the ELBO of each fit on its own data, so only the shapes can be compared."
    picture = comparison_plots.elbo_curves({fit.name: fit.posterior.losses for fit in fits}, together=same_data)
    return Section("How did each fit go?", reading, picture, figure_label="ELBO by step, of each fit")


def _posteriors(fits: list[_Fit], draws: int) -> Iterator[Section]:
    """The latents that two fits or more have, those whose means differ most first."""
    shared = _shared({fit.name: fit.posterior for fit in fits if not fit.posterior.is_autoencoder}, draws)
    if not shared:
        return

    def distance(latent: str) -> float:
        means, sds = zip(*((values.mean(), values.std()) for values in shared[latent].values()), strict=True)
        return float(np.ptp(means)) / (float(np.mean(sds)) or 1.0)

    def interval(values: np.ndarray | None) -> str:
        if values is None:
            return "–"
        low, high = np.quantile(values, [0.05, 0.95])
        return f"{values.mean():.3g} [{low:.3g}, {high:.3g}]"

    ordered = {latent: shared[latent] for latent in sorted(shared, key=distance, reverse=True)}
    panels, rows = dict(list(ordered.items())[:MAX_PANELS]), dict(list(ordered.items())[:MAX_ROWS])
    names = [fit.name for fit in fits]
    reading = (
        "What the fits say of the unknowns that they share: the mark is the mean, the line holds 90 % of the "
        "posterior. Those that differ most, in their own standard deviations, come first."
    )
    some = f" ({len(panels)} of {len(ordered):,})" if len(panels) < len(ordered) else ""
    picture = comparison_plots.intervals(panels, names)
    yield Section(
        f"Do they agree on what they share?{some}", reading, picture, figure_label="means and intervals by fit"
    )
    table = [[latent, *(interval(found.get(name)) for name in names)] for latent, found in rows.items()]
    some = f" ({len(rows)} of {len(ordered):,})" if len(rows) < len(ordered) else ""
    yield Section(f"Shared unknowns{some}", "Mean and 90 % interval.", None, table, ["", *names])


def _shared(posteriors: Mapping[str, Approximation], draws: int) -> dict[str, dict[str, np.ndarray]]:
    sites = [site.name for posterior in posteriors.values() for site in posterior.bound_model.latents]
    several = {name for name in sites if sites.count(name) > 1}
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, posterior in posteriors.items():
        if several:
            drawn = {site: value.numpy() for site, value in posterior.sample(draws).items() if site in several}
            for latent, values in scalars(drawn).items():
                found.setdefault(latent, {})[name] = values
    return {latent: by_fit for latent, by_fit in found.items() if len(by_fit) > 1}


def _calibration(fits: list[_Fit], same_rows: bool) -> Iterator[Section]:
    """Held-out calibration, where two fits or more have it of one kind."""
    scores = {fit.name: fit.held_out.scores for fit in fits if fit.held_out is not None}
    where = "On the same held-out rows" if same_rows else "Each on held-out rows of its own"
    pits = {name: found.pit.numpy() for name, found in scores.items() if isinstance(found, Scores)}
    if len(pits) > 1:
        reading = (
            f"{where}: the share inside the interval of each probability. On the grey line intervals hold what they "
            "promise; below it a fit is too sure, above it not sure enough."
        )
        picture = comparison_plots.coverage_curves(pits)
        yield Section("Do their intervals hold what they promise?", reading, picture, figure_label="coverage by fit")
    reliable = {name: found.reliability for name, found in scores.items() if isinstance(found, ClassScores)}
    if len(reliable) > 1:
        reading = (
            f"{where}: how often the predicted class is right, by the probability given to it. On the grey line "
            "probabilities can be taken at their word; below it a fit is too sure."
        )
        picture = comparison_plots.reliability_curves(reliable)
        yield Section("Can their probabilities be believed?", reading, picture, figure_label="reliability by fit")
