"""A posterior as ArviZ knows it: every group, with dimensions named from the plates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from inference.diagnostics.importance_sampling import khat_threshold, smoothed_weights
from inference.model.sites import Site
from inference.predictive.approximation import Approximation
from inference.predictive.importance_weights import log_weights, why_no_weights
from inference.predictive.posterior_predictive import PredictionOptions, log_likelihood, predict_data
from inference.predictive.sampling import Draws, count_of
from inference.storage.json_document import versions
from inference.utils.arviz_compat import group_container

__all__ = ["to_arviz"]

SAMPLE_DIMS = ("chain", "draw")


def to_arviz(
    approximation: Approximation,
    drawn: dict[str, Tensor],
    draws: int,
    seed: int,
    *,
    corrected: bool,
    others: Mapping[str, xr.Dataset],
) -> Any:
    """Return InferenceData under ArviZ 0.x, a DataTree under 1.x, with one chain of the ``draws`` draws ``drawn``.

    Groups: ``posterior``, ``posterior_predictive``, ``log_likelihood``,
    ``prior``, ``prior_predictive``, ``observed_data``, ``constant_data`` (the
    inputs), and ``optimization`` with ``loss`` = −ELBO in nats by ``step``. The
    dimension of a plate carries the plate's name; others are ``{site}_dim_{i}``.
    Draws of q are independent, not a Markov chain; those of ``posterior``,
    ``posterior_predictive`` and ``log_likelihood`` are the same. Attributes of
    ``posterior`` say what they are draws of, by ``corrected``, and Pareto k-hat with the
    threshold above which q is not to be taken for the posterior, ``az.loo`` least
    of all. A posterior loaded without data has only ``posterior`` and
    ``optimization``. ``others`` are groups that exist already.
    """
    latents = {site.name: site for site in approximation.bound_model.latents}
    groups = {"posterior": _draws(drawn, latents)}
    about: dict[str, str | float] = {"draws_of": "q, picked by importance weights" if corrected else "q"}
    if approximation.has_data and approximation.batches is None and why_no_weights(approximation) is None:
        weights = smoothed_weights(log_weights(approximation, draws, seed=seed).double().numpy())
        about |= {"pareto_khat": weights.khat, "pareto_khat_threshold": khat_threshold(draws)}
    groups["posterior"].attrs.update(about)
    if approximation.has_data:
        groups |= _data_groups(approximation, latents, drawn or draws, seed)  # a model of parameters has no latents
    steps = {"step": np.arange(1, len(approximation.losses) + 1)}
    history = {"loss": ("step", approximation.losses), "kl": ("step", approximation.kl)}
    groups["optimization"] = xr.Dataset(history, coords=steps)
    groups |= others
    for dataset in groups.values():
        dataset.attrs |= {"inference_library": "kiln-ppl", "inference_library_version": versions()["kiln-ppl"]}
    return group_container({name: dataset for name, dataset in groups.items() if dataset.data_vars})


def _data_groups(
    approximation: Approximation, latents: dict[str, Site], draws: Draws, seed: int
) -> dict[str, xr.Dataset]:
    observed = {site.name: site for site in approximation.bound_model.observed}
    count = draws if isinstance(draws, int) else count_of(dict(draws))
    prior = approximation.prior(count, seed=seed)
    predictive = {}
    for name in observed:
        predictive[name] = predict_data(approximation, PredictionOptions(draws=draws, seed=seed, site=name)).samples
    likelihood = log_likelihood(approximation, draws=draws, seed=seed)
    values = approximation.observed_values()
    return {
        "posterior_predictive": _draws(predictive, observed),
        "log_likelihood": _draws(likelihood, observed),
        "prior": _draws({n: v for n, v in prior.items() if n in latents}, latents),
        "prior_predictive": _draws({n: v for n, v in prior.items() if n in observed}, observed),
        "observed_data": _dataset({name: (observed[name].dims, value) for name, value in values.items()}),
        "constant_data": _dataset(_inputs(approximation, observed, values)),
    }


def _draws(values: Mapping[str, Tensor], sites: Mapping[str, Site]) -> xr.Dataset:
    """Return (S, …) tensors as variables of dims (chain, draw, …)."""
    return _dataset(
        {name: (SAMPLE_DIMS + sites[name].dims[: value.dim() - 1], value[None]) for name, value in values.items()}
    )


def _dataset(variables: Mapping[str, tuple[tuple[str, ...], Tensor]]) -> xr.Dataset:
    # A dimension may not share its name with a variable that has other dimensions.
    taken = set(variables)
    renamed = {n: (tuple(f"{d}_dim" if d in taken else d for d in dims), v) for n, (dims, v) in variables.items()}
    sizes = {d: size for dims, value in renamed.values() for d, size in zip(dims, value.shape, strict=True)}
    arrays = {name: (dims, value.detach().cpu().numpy()) for name, (dims, value) in renamed.items()}
    return xr.Dataset(arrays, coords={dim: np.arange(size) for dim, size in sizes.items()})


def _inputs(
    approximation: Approximation, observed: Mapping[str, Site], values: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Return the arguments that are not observations, their rows on the plate of the observations."""
    rows = {value.shape[0]: observed[n].dims[0] for n, value in values.items() if value.dim()}
    found = {}
    for name, value in approximation.inputs().items():
        dims = tuple(f"{name}_dim_{i}" for i in range(value.dim()))
        if value.dim() and len(value) in rows:
            dims = (rows[len(value)], *dims[1:])
        found[name] = (dims, value)
    return found
