"""Draws of q with their importance weights p(x, z)/q(z), and the judgements that rest on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.arguments import row_count
from inference.data.batch_loader import BatchLoader
from inference.diagnostics import checks
from inference.diagnostics.checks import Diagnosis, NoWeights
from inference.diagnostics.importance_sampling import LeaveOneOut, khat_threshold, leave_one_out, smoothed_weights
from inference.model.bound_model import BoundModel, row_scale
from inference.model.elbo import log_density, log_weight, traces
from inference.model.protocols import NoCommonDensity, supports
from inference.model.sites import latent_values, refuse_weighted_rows, scalars
from inference.model.subsampling import SubsampleScale
from inference.model.vectorization import affordable, draws_together, map_over_draws, rows_together
from inference.predictive.approximation import Approximation
from inference.predictive.posterior_predictive import PredictionOptions, log_likelihoods
from inference.predictive.sampling import row_parts
from inference.utils.validation import positive_integer

__all__ = [
    "UnreliableWeights",
    "corrected_draws",
    "diagnose",
    "doubts",
    "log_weights",
    "loo",
    "weighted_draws",
    "why_no_weights",
]

PROPOSED = 10_000  # draws from which corrected ones are picked, at least
USUAL_DRAWS, LEAST_DRAWS = 1000, 100  # of one repeat of a diagnosis
MOST_NUMBERS = 2 * 10**7  # latents times draws that are kept to compare moments
MOST_LATENTS = 10_000  # of all rows together, beyond which one row's misfit drowns in the others' noise
_TOGETHER = 4  # times as many as where what is computed is kept for each row


class UnreliableWeights(ValueError):
    """Importance weights do not exist, correct nothing, or do not say what an observation weighs."""


def why_no_weights(approximation: Approximation) -> NoWeights | None:
    """Return why q has no importance weights, and what to do instead; None if it has."""
    bound_model, batches = approximation.bound_model, approximation.batches
    if bound_model.is_delta:
        return NoWeights(
            "the guide is a point estimate: it has a best value but no uncertainty", "fit a guide with a spread"
        )
    if approximation.is_autoencoder and sum(math.prod(site.shape) for site in bound_model.latents) > MOST_LATENTS:
        return NoWeights(
            f"{len(approximation.data[0]):,} rows have latents of their own, too many for weights of all together",
            "compare the ELBO of held-out rows with log_evidence: posterior.evaluate(x_test)",
        )
    advice = "judge it by rows that were held out: posterior.evaluate(x, y)"
    if batches is not None and approximation.latent_sampler.row_sites():
        return NoWeights(f"each of {batches.num_data:,} rows that are read in batches has latents of its own", advice)
    guide = bound_model.guide
    if supports(guide, NoCommonDensity) and guide.no_common_density:
        return NoWeights(guide.no_common_density, advice)
    return None


def weighted_draws(approximation: Approximation, draws: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return draws of q, ``{site: (S, *site shape)}``, and log p(x, z) − log q(z) of each in nats, (S,)."""
    bound_model, batches = approximation.bound_model, approximation.batches
    if batches is not None:
        scale = row_scale(bound_model, batches.first, batches.num_data)
        with approximation.running(seed):
            return _weighted_by_batches(bound_model, batches, scale, draws)

    def run(_: object) -> tuple[dict[str, Tensor], Tensor]:
        model_trace, guide_trace = traces(bound_model.model, bound_model.guide, approximation.data)
        return latent_values(guide_trace), log_weight(model_trace, guide_trace)

    with approximation.running(seed):
        found: tuple[dict[str, Tensor], Tensor] = map_over_draws(run, {}, draws, draws_together(approximation.data))
    return found


def log_weights(approximation: Approximation, draws: int = 1000, *, seed: int = 0) -> Tensor:
    """The log weight log p(x, zₛ) − log q(zₛ) in nats on the full data, shape (S,)."""
    count = positive_integer(draws, "draws")
    if approximation.batches is not None:
        return weighted_draws(approximation, count, seed)[1]

    def run(_: object) -> Tensor:
        return log_weight(*traces(approximation.bound_model.model, approximation.bound_model.guide, approximation.data))

    with approximation.running(seed):
        found: Tensor = map_over_draws(run, {}, count, draws_together(approximation.data))
    return found


def corrected_draws(approximation: Approximation, draws: int, seed: int) -> dict[str, Tensor]:
    """Return draws that Pareto-smoothed importance weights pick, ``{site: (S, *site shape)}``.

    Raises
    ------
    ValueError
        If the guide has no weights, or if its Pareto k-hat is too high for weights to correct anything.
    """
    drawn, found = _reliable_draws(approximation, max(draws, PROPOSED), seed, "there are no corrected draws")
    kept = torch.from_numpy(smoothed_weights(found).resampled(draws, np.random.default_rng(seed)))
    return {name: value[kept] for name, value in drawn.items()}


def _reliable_draws(
    approximation: Approximation, draws: int, seed: int, refusal: str
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Return draws of q with their log weights, (S,), or raise an error if those correct nothing."""
    refused, limit = why_no_weights(approximation), khat_threshold(draws)
    if refused is not None:
        raise UnreliableWeights(f"{refusal}, as {refused.reason}: {refused.advice}")
    drawn, found = weighted_draws(approximation, draws, seed)
    weights = found.double().numpy()
    khat = smoothed_weights(weights).khat
    if not khat < limit:
        raise UnreliableWeights(
            f"{refusal}, as Pareto k-hat of {draws:,} draws is {khat:.2f}, and weights correct nothing from "
            f"{limit:.2f} on: try a guide with more shape, or re-parameterise the model"
        )
    return drawn, weights


def diagnose(approximation: Approximation, *, draws: int | None = None, repeats: int = 5, seed: int = 0) -> Diagnosis:
    """Judge whether the fit can be trusted: a verdict with its numbers, limits and reasons.

    From R repeats of S draws and their importance weights p(x, z)/q(z):
    Pareto k-hat, and how far the guide's moments are from those that the
    weights correct; from the losses and the end of the fit whether it had settled.
    S is 1,000 if left out; where rows are read in batches, as many as take about
    a minute, at least 100.
    """
    losses, stop, refused = approximation.losses, approximation.record.stop, why_no_weights(approximation)
    if refused is not None:
        return checks.diagnose(refused, losses, stop=stop)
    count, batches = positive_integer(repeats, "repeats"), approximation.batches
    if draws is not None:
        size = positive_integer(draws, "draws")
    elif batches is None:
        size = USUAL_DRAWS
    else:
        _, all_draws = affordable(batches.num_data, approximation.bound_model.params.size, USUAL_DRAWS * count)
        size = max(LEAST_DRAWS, all_draws // count)
    weights, values = _weights_and_values(approximation, size * count, seed)
    return checks.diagnose(weights.reshape(count, size), losses, values, stop)


def doubts(approximation: Approximation, *, draws: int = 1000, repeats: int = 3, seed: int = 0) -> tuple[str, ...]:
    """Return what R repeats of S draws and their importance weights say against the guide.

    Empty if the guide has no weights, and where rows are read in batches, which
    all would have to be once more.
    """
    if why_no_weights(approximation) is not None or approximation.batches is not None:
        return ()
    size, count = positive_integer(draws, "draws"), positive_integer(repeats, "repeats")
    weights, values = _weights_and_values(approximation, size * count, seed)
    found = checks.weight_checks(weights.reshape(count, size), values)
    return tuple(check.found for check in found if not check.passed)


def _weights_and_values(
    approximation: Approximation, draws: int, seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray] | None]:
    """Return (S,) log weights, and each latent number by name, (S,), where they are few enough to keep."""
    if draws * sum(math.prod(site.shape) for site in approximation.bound_model.latents) > MOST_NUMBERS:
        return log_weights(approximation, draws, seed=seed).double().numpy(), None
    drawn, found = weighted_draws(approximation, draws, seed)
    return found.double().numpy(), scalars({name: value.numpy() for name, value in drawn.items()})


def loo(
    approximation: Approximation,
    *,
    draws: int = 4000,
    seed: int = 0,
    site: str | None = None,
    batch_size: int | None = None,
) -> LeaveOneOut:
    """Leave-one-out cross-validation of the model without fitting again: Σᵢ log p(yᵢ | y₋ᵢ) in nats.

    From S draws of q, whose weights p(y, z)/(q(z) p(yᵢ | z)) make them the
    posterior's without observation i; see :func:`~inference.diagnostics.importance_sampling.leave_one_out`.
    An observation is each number of the log likelihood, (N, …).

    Parameters
    ----------
    site
        The observed site, where the model has more than one.
    batch_size
        The most rows to run the model on at a time, as in :meth:`predict`.

    Raises
    ------
    ValueError
        If the guide has no weights, or its Pareto k-hat is above
        :func:`~inference.diagnostics.importance_sampling.khat_threshold`, where no weights make up for the
        approximation; if the site is scaled or masked, so that what an
        observation weighs is not its likelihood.

    Examples
    --------
    >>> from functools import partial
    >>> import kiln
    >>> from kiln.guides import full_rank_normal
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(-1, 1, 30).reshape(-1, 1)
    >>> y = 2 * x[:, 0] + torch.linspace(-3, 3, 30).sin()
    >>> line = partial(linear_regression, noise=0.5)
    >>> loo = kiln.fit(line, full_rank_normal(line), x, y, steps=1000, progress=False).loo(draws=1000)
    >>> loo.pointwise.shape, loo.pareto_k.shape, loo.doubtful
    ((30,), (30,), ())
    """
    wanted, count = approximation.resolve_site(site), positive_integer(draws, "draws")
    if approximation.batches is not None:
        raise UnreliableWeights(
            f"leave-one-out needs all {approximation.batches.num_data:,} rows in memory: score held-out rows instead, "
            "posterior.evaluate(x_test, y_test)"
        )
    bound_model, data = approximation.bound_model, approximation.data
    with approximation.running(seed):
        model_trace, _ = traces(bound_model.model, bound_model.guide, data)
    try:
        refuse_weighted_rows(model_trace, wanted)
    except ValueError as error:
        raise UnreliableWeights(str(error)) from error
    drawn, weights = _reliable_draws(
        approximation, count, seed, "leave-one-out would be of the guide, not of the model"
    )
    options = PredictionOptions(draws=drawn, seed=seed, batch_size=batch_size, progress=False)
    parts = log_likelihoods(approximation, [wanted], data, options)
    return leave_one_out(wanted, weights, (part[wanted].double().numpy() for part in parts))


def _weighted_by_batches(
    bound_model: BoundModel, batches: BatchLoader, scale: SubsampleScale, draws: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return draws of q, ``{site: (S, *site shape)}``, and their log weights on all rows in nats, (S,) in double.

    log w(z) = log p(z) − log q(z) + Σₙ log p(xₙ | z), where the sum is over what
    is inside the plates over rows that ``scale`` knows, one reading of all rows
    for all draws. For latents that rows share; inside ``bound_model.running``.
    """

    def begin(_: object) -> tuple[dict[str, Tensor], Tensor]:
        model_trace, guide_trace = traces(bound_model.model, bound_model.guide, batches.first)
        return latent_values(guide_trace), _density(model_trace, scale, False) - log_density(guide_trace)

    found: tuple[dict[str, Tensor], Tensor] = map_over_draws(begin, {}, draws, draws_together(batches.first))
    drawn, total = found[0], found[1].double()

    def of_rows(args: tuple[Any, ...], z: Mapping[str, Tensor]) -> Tensor:
        conditioned = poutine.condition(bound_model.model, data=dict(z))
        return _density(poutine.trace(conditioned).get_trace(*args), scale, True)

    with tqdm(desc="weights", total=batches.num_data, unit="row", delay=1, leave=False) as bar:
        for piece in batches.once():
            for _, part in row_parts(piece, _TOGETHER * rows_together(piece, draws)):
                total += map_over_draws(partial(of_rows, part), drawn, draws, draws)
            bar.update(row_count(piece) or 0)
    return drawn, total


def _density(trace: poutine.Trace, scale: SubsampleScale, of_rows: bool) -> Tensor:
    """Sum the log densities inside the plates over rows, or all others."""
    total = torch.zeros((), dtype=torch.float64)
    for site in trace.nodes.values():
        if site["type"] == "sample" and scale.is_of_rows(site) == of_rows and not poutine.util.site_is_subsample(site):
            value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            total = total + torch.as_tensor(scale_and_mask(value, site["scale"], site["mask"])).double().sum()
    return total
