"""The report: one HTML file that says what was fitted, what it found and whether to believe it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.arguments import row_count
from inference.diagnostics.verdict import verdict
from inference.model.protocols import HasImageShape, supports
from inference.model.sites import scalars
from inference.model.vectorization import affordable
from inference.predictive.approximation import Approximation
from inference.predictive.autoencoder import HeldOutRows
from inference.predictive.importance_weights import UnreliableWeights, diagnose, loo
from inference.predictive.posterior_predictive import PredictionOptions, predict, predict_data
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.scoring import HeldOut
from inference.reporting.autoencoder_section import autoencoder_sections
from inference.reporting.figures import posterior_plots
from inference.reporting.figures.image_grids import as_images, entropy_grids
from inference.reporting.figures.style import as_svg
from inference.reporting.held_out_section import held_out_sections, loo_section
from inference.reporting.section import Labels, Section, provenance, write_page
from inference.reporting.trust_section import trust_sections

__all__ = ["write_report"]

MAX_PANELS, MAX_ROWS = 12, 40
MOST_LEFT_OUT, LEFT_OUT_DRAWS = 2_000, 2_000


def write_report(
    posterior: Approximation,
    path: Path,
    *,
    held_out: HeldOut | HeldOutRows | None = None,
    labels: Labels | None = None,
    baselines: Mapping[str, float] | None = None,
    groups: Any = None,
    draws: int = 1000,
    progress: bool = True,
) -> Path:
    """Write the report of ``posterior`` to ``path``, which becomes one file with everything inside.

    Parameters
    ----------
    held_out
        The evaluation on rows that the fit never saw, from :meth:`Posterior.evaluate`.
    labels
        Names for the reader, see :class:`Labels`.
    baselines
        Test RMSE of other methods on the same rows, by name.
    groups
        Of an autoencoder: a label for each held-out row (or each row of the
        fit, if none was held out), which colours the map of codes.
    draws
        Draws of the posterior behind each figure.
    progress
        Show a bar while the parts are computed.

    Raises
    ------
    ValueError
        If the posterior was loaded without its data.
    """
    names = labels or Labels()
    parts: list[Callable[[], Iterable[Section]]]
    if posterior.is_autoencoder:
        rows = held_out if isinstance(held_out, HeldOutRows) else None
        parts = [lambda: autoencoder_sections(posterior, rows, groups)]
    else:
        predicted = held_out if isinstance(held_out, HeldOut) else None
        parts = _of_predictions(posterior, predicted, baselines or {}, names, draws)
    diagnosis = diagnose(posterior)
    parts.insert(0, lambda: trust_sections(diagnosis, posterior.losses, posterior.kl))
    bar = tqdm(parts, desc="report", unit="part", disable=not progress, leave=False)
    sections = [section for part in bar for section in part()]
    return write_page(
        path,
        "report.html",
        title=names.title or f"{posterior.model_name} by {posterior.guide_name}",
        verdict=verdict(diagnosis),
        facts=_facts(posterior, names),
        sections=sections,
        provenance=provenance(
            [
                ("seed", str(posterior.record.seed)),
                ("device", str(posterior.bound_model.device)),
                ("float type", str(posterior.bound_model.dtype).removeprefix("torch.")),
                ("threads", str(torch.get_num_threads())),
                ("seconds of fitting", f"{posterior.record.seconds:.1f}"),
            ]
        ),
    )


def _of_predictions(
    posterior: Approximation, held_out: HeldOut | None, baselines: Mapping[str, float], names: Labels, draws: int
) -> list[Callable[[], Iterable[Section]]]:
    shown = _shown(posterior, draws) if len(posterior.bound_model.observed) == 1 else None
    return [
        lambda: held_out_sections(held_out, baselines, names) if held_out is not None else [],
        lambda: _images(posterior, held_out, shown),
        lambda: _predictive(posterior, shown, draws, names),
        lambda: _replications(posterior, shown, draws, names),
        lambda: _left_out(posterior),
        lambda: _posterior(posterior, draws),
    ]


def _left_out(posterior: Approximation) -> Iterator[Section]:
    """Leave-one-out, where the weights allow it and the observations are few enough to look at each."""
    if len(posterior.bound_model.observed) != 1 or math.prod(posterior.bound_model.observed[0].shape) > MOST_LEFT_OUT:
        return
    with suppress(UnreliableWeights):  # a point, a guide that is too far away, scaled or masked observations
        yield loo_section(loo(posterior, draws=LEFT_OUT_DRAWS))


def _facts(posterior: Approximation, names: Labels) -> list[tuple[str, str]]:
    bound_model = posterior.bound_model
    latents = sum(int(np.prod(site.shape)) for site in bound_model.latents)
    shapes = ", ".join(f"{n} {tuple(v.shape)}" for n, v in posterior.inputs().items()) or "none"
    facts = [
        (
            "Model",
            f"{posterior.model_name}: {_count(latents, 'unknown number')} "
            f"in {_count(len(bound_model.latents), 'site')}",
        ),
        ("Guide", f"{posterior.guide_name}: {bound_model.params.size} parameters"),
        ("Inputs", shapes),
        ("Observed", ", ".join(f"{s.name} {s.shape}" for s in bound_model.observed) or "none"),
        ("Fit", _how(posterior)),
    ]
    return [("Data", names.data), *facts] if names.data else facts


def _how(posterior: Approximation) -> str:
    options, starts = posterior.record.options, posterior.record.starts
    parts = [f"{options.get('steps')} steps of {options.get('optimizer')}, step size {options.get('lr')}"]
    if posterior.record.stop is not None:
        taken = len(posterior.losses)
        parts = [f"start, steps and end found on the way, {taken:,} of at most {options.get('steps', taken):,} steps"]
    anneal = options.get("anneal")
    if anneal is not None:
        parts.append(f"target annealed {f'over {anneal} steps' if isinstance(anneal, int) else f'by {anneal}'}")
    if len(starts) > 1:
        ends = ", ".join(f"{-loss:.4g}" for loss in starts)
        parts.append(f"the best of {len(starts)} starts, which ended at an ELBO of {ends}")
    if posterior.record.stop is not None:
        parts.append(posterior.stop_reason)
    return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


@dataclass(frozen=True)
class Shown:
    """A prediction to look at: on which rows, what was observed there, and the model's inputs."""

    where: str
    prediction: Prediction | ClassPrediction
    observed: np.ndarray
    inputs: tuple[Any, ...]


def _shown(posterior: Approximation, draws: int) -> Shown:
    """The one observed site at the rows of the fit, or at as many of them as take some ten seconds."""
    observed = posterior.observed_values()[posterior.observed_site].cpu()
    inputs = tuple(posterior.inputs().values())
    rows = row_count(posterior.data) or 1
    few, fewer = affordable(rows, posterior.bound_model.params.size, draws)
    if posterior.record.options.get("batch_size") is None or few >= rows:  # without one, rows may depend on each other
        prediction = predict_data(posterior, PredictionOptions(draws=fewer))
        return Shown("On the rows of the fit", prediction, observed.numpy(), inputs)
    chosen = np.linspace(0, rows - 1, few).astype(int)
    hidden = {site.argument for site in posterior.bound_model.observed}
    given = [
        v[chosen] if isinstance(v, Tensor) and v.dim() and i not in hidden else None
        for i, v in enumerate(posterior.data)
    ]
    prediction = predict(posterior, tuple(given), PredictionOptions(draws=fewer))
    where = f"On {few:,} of the {rows:,} rows of the fit"
    return Shown(where, prediction, observed[chosen].numpy(), tuple(value[chosen] for value in inputs))


def _predictive(posterior: Approximation, shown: Shown | None, draws: int, names: Labels) -> Iterator[Section]:
    if shown is None:
        return
    prediction, observed = shown.prediction, shown.observed
    inputs = list(posterior.inputs().values())
    x = inputs[0] if len(inputs) == 1 else None
    one_column = x is not None and x.is_floating_point() and x.dim() in (1, 2) and x.numel() == len(x)
    if isinstance(prediction, ClassPrediction):
        reading = f"{shown.where}: entropy is 0 where the model is sure; rows it gets wrong should lie further right."
        picture = posterior_plots.class_entropy(prediction, observed)
    elif x is not None and one_column and observed.ndim == 1:
        reading = (
            "Each thin line is one function that the data leave possible: where they fan out, the data say little; "
            "about nine in ten points should lie in the band."
        )
        picture = _function_draws(posterior, x, observed, draws, names)
    else:
        reading = (
            f"{shown.where}: a vertical line is where a new observation should fall nine times in ten, so longer lines "
            "mean less certainty."
        )
        label = names.target or prediction.site
        draws_of_rows, samples = (v.reshape(len(v), -1) for v in (prediction.draws, prediction.samples))
        flat = Prediction(prediction.site, draws_of_rows, samples, prediction.noise.reshape(-1))
        picture = posterior_plots.observed_vs_predicted(flat, observed.reshape(-1), label)
    yield Section("How uncertain are the predictions?", reading, picture, figure_label="predictive uncertainty")


def _images(posterior: Approximation, held_out: HeldOut | None, shown: Shown | None) -> Iterator[Section]:
    """Of an image classifier: the images it is surest and least sure of, of each class."""
    if held_out is not None:
        seen = Shown("Of the held-out images", held_out.prediction, held_out.observed.numpy(), held_out.inputs)
    elif shown is not None:
        seen = replace(shown, where=shown.where.replace("On the rows", "Of the images"))
    else:
        return
    model = posterior.bound_model.model
    images = as_images(seen.inputs, model.image_shape if supports(model, HasImageShape) else None)
    if images is None or not isinstance(seen.prediction, ClassPrediction):
        return
    reading = (
        f"{seen.where}, of each class those with the lowest and the highest predictive entropy; a frame marks the ones "
        "that it gets wrong, which should be among the least sure, and hard to tell for you too."
    )
    picture = as_svg(entropy_grids(images, seen.observed, seen.prediction))
    yield Section("Which images is it sure of?", reading, picture, figure_label="surest and least sure images")


def _function_draws(posterior: Approximation, column: Tensor, observed: np.ndarray, draws: int, names: Labels) -> str:
    x = column.cpu().numpy().reshape(-1)
    margin = 0.1 * np.ptp(x)
    grid = np.linspace(x.min() - margin, x.max() + margin, 200)
    prediction = predict(posterior, (grid.reshape(-1, *column.shape[1:]),), PredictionOptions(draws=draws))
    axes = (names.columns[0] if names.columns else "x", names.target or posterior.observed_site)
    return posterior_plots.functions(grid, cast(Prediction, prediction), (x, observed), axes)


def _replications(posterior: Approximation, shown: Shown | None, draws: int, names: Labels) -> Iterator[Section]:
    reading = (
        "Data sets that the fitted model makes, over the real one: where the black line leaves the band, the model "
        "does not describe the data."
    )
    if shown is not None:
        label = names.target or shown.prediction.site
        yield _replicated(shown.observed, shown.prediction.samples[:200], label, reading)
        return
    for site, value in posterior.observed_values().items():
        samples = predict_data(posterior, PredictionOptions(draws=min(draws, 200), site=site)).samples
        yield _replicated(value.cpu().numpy(), samples, site, reading)


def _replicated(observed: np.ndarray, samples: Tensor, label: str, reading: str) -> Section:
    flat = samples.reshape(len(samples), -1).numpy().astype(float)
    picture = posterior_plots.predictive_check(observed.reshape(-1).astype(float), flat, label)
    return Section(f"Does the model make data like {label}?", reading, picture, figure_label="replicated data")


def _posterior(posterior: Approximation, draws: int) -> Iterator[Section]:
    import arviz as az

    values = scalars({n: v.numpy() for n, v in posterior.sample(draws).items()})
    if not values:
        return
    # Of a fit by mini-batches, one batch shows the latents that all rows share.
    before = posterior.prior(draws, rows=posterior.record.options.get("batch_size"))
    prior = scalars({n: v.numpy() for n, v in before.items()})
    chosen = dict(list(values.items())[:MAX_PANELS])
    reading = (
        "What was believed before the data (outline) and after (filled): a filled shape like its outline means that "
        "the data said nothing about that quantity."
    )
    yield Section(
        "What did the data teach?" + _partly(len(chosen), len(values)),
        reading,
        posterior_plots.marginals(chosen, prior),
        figure_label="posterior against prior",
    )
    rows = dict(list(values.items())[:MAX_ROWS])
    numbered = {f"v{i}": drawn[None] for i, drawn in enumerate(rows.values())}  # ArviZ 1.x takes no / in a name
    frame = az.summary(numbered, kind="stats", round_to="none")
    table = [[name, *(f"{float(v):.4g}" for v in row)] for name, row in zip(rows, frame.to_numpy(), strict=True)]
    reading = (
        "Each unknown's mean, standard deviation, and the range that holds it with the probability named in the "
        "heading; the weights of a network mean little one by one."
    )
    yield Section(
        "Posterior table" + _partly(len(rows), len(values)), reading, None, table, ["", *map(str, frame.columns)]
    )


def _partly(shown: int, total: int) -> str:
    return f" ({shown} of {total} unknowns)" if shown < total else ""
