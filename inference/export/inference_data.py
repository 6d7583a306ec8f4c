"""A posterior as ArviZ knows it: every group, with dimensions named from the plates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from torch import Tensor

from inference.model.sites import Site
from inference.utils.arviz_compat import group_container
from inference.utils.versions import versions

if TYPE_CHECKING:
    from inference.predictive.approximation import Approximation as Posterior

__all__ = ["to_arviz"]

SAMPLE_DIMS = ("chain", "draw")


def to_arviz(
    posterior: Posterior,
    drawn: dict[str, Tensor],
    draws: int,
    seed: int,
    about: Mapping[str, str | float],
    others: Mapping[str, xr.Dataset],
) -> Any:
    """InferenceData under ArviZ 0.x, a DataTree under 1.x, with one chain of the ``draws`` draws ``drawn``.

    Groups: ``posterior``, ``posterior_predictive``, ``log_likelihood``,
    ``prior``, ``prior_predictive``, ``observed_data``, ``constant_data`` (the
    inputs), and ``optimization`` with ``loss`` = −ELBO in nats by ``step``. The
    dimension of a plate carries the plate's name; others are ``{site}_dim_{i}``.
    Draws of q are independent, not a Markov chain; those of ``posterior``,
    ``posterior_predictive`` and ``log_likelihood`` are the same. Attributes of
    ``posterior`` say ``about`` them what they are of, and Pareto k-hat with the
    threshold above which q is not to be taken for the posterior, ``az.loo`` least
    of all. A posterior loaded without data has only ``posterior`` and
    ``optimization``. ``others`` are groups that are there already.
    """
    latents = {site.name: site for site in posterior.bound_model.latents}
    groups = {"posterior": _draws(drawn, latents)}
    groups["posterior"].attrs.update(about)
    if posterior.has_data:
        groups |= _data_groups(posterior, latents, drawn, draws, seed)
    steps = {"step": np.arange(1, len(posterior.losses) + 1)}
    curves = {"loss": ("step", posterior.losses), "kl": ("step", posterior.kl)}
    groups["optimization"] = xr.Dataset(curves, coords=steps)
    groups |= others
    for dataset in groups.values():
        dataset.attrs |= {"inference_library": "kiln-ppl", "inference_library_version": versions()["kiln-ppl"]}
    return group_container({name: dataset for name, dataset in groups.items() if dataset.data_vars})


def _data_groups(
    posterior: Posterior, latents: dict[str, Site], drawn: dict[str, Tensor], draws: int, seed: int
) -> dict[str, xr.Dataset]:
    observed = {site.name: site for site in posterior.bound_model.observed}
    prior = posterior.prior(draws, seed=seed)
    at = drawn or draws  # a model of parameters alone has no latents
    predictive = {name: posterior.predict_data(draws=at, seed=seed, site=name).samples for name in observed}
    likelihood = posterior.log_likelihood(draws=at, seed=seed)
    values = posterior.observed_values()
    return {
        "posterior_predictive": _draws(predictive, observed),
        "log_likelihood": _draws(likelihood, observed),
        "prior": _draws({n: v for n, v in prior.items() if n in latents}, latents),
        "prior_predictive": _draws({n: v for n, v in prior.items() if n in observed}, observed),
        "observed_data": _dataset({name: (observed[name].dims, value) for name, value in values.items()}),
        "constant_data": _dataset(_inputs(posterior, observed, values)),
    }


def _draws(values: Mapping[str, Tensor], sites: Mapping[str, Site]) -> xr.Dataset:
    """(S, …) tensors as variables of dims (chain, draw, …)."""
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
    posterior: Posterior, observed: Mapping[str, Site], values: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """The arguments that are not observations, their rows on the plate of the observations."""
    rows = {value.shape[0]: observed[n].dims[0] for n, value in values.items() if value.dim()}
    found = {}
    for name, value in posterior.inputs().items():
        dims = tuple(f"{name}_dim_{i}" for i in range(value.dim()))
        if value.dim() and len(value) in rows:
            dims = (rows[len(value)], *dims[1:])
        found[name] = (dims, value)
    return found
