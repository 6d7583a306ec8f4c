"""The two ArviZ generations behind one face: 0.x with InferenceData, 1.x with DataTree."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import logsumexp

__all__ = ["group_container", "psis"]

_FEWEST = 5  # draws that have a shape
_EVEN = 1e-3  # nats: what single precision leaves of a log density in the thousands


def _is_first_generation() -> bool:
    import arviz as az

    return bool(az.__version__.startswith("0."))


def group_container(groups: Mapping[str, xr.Dataset]) -> Any:
    """The datasets as InferenceData (0.x) or DataTree (1.x).

    Raises
    ------
    ValueError
        If a site's name has a slash, which a DataTree has for its groups.
    """
    if _is_first_generation():
        import arviz as az

        return az.InferenceData(**groups)
    if slashed := sorted({str(name) for dataset in groups.values() for name in dataset.variables if "/" in str(name)}):
        raise ValueError(f"the names {slashed} have a '/', which ArviZ 1.x keeps for groups: rename the sites")
    return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log weights that sum to 1 over S, and k̂ (…), of log weights (…, S).

    The tail to which a generalised Pareto is fitted has min(S/5, 3√S) draws.
    Fewer than five have no shape: k̂ is infinite and nothing smoothed. Nor have
    those that agree within 10⁻³ nats, as of a q that is the posterior; but
    they are even, and k̂ is 0.
    """
    shape, draws = log_weights.shape[:-1], log_weights.shape[-1]
    rows = log_weights.reshape(-1, draws).astype(float)
    tail = math.floor(min(draws / 5, 3 * draws**0.5))
    lowest = draws - min(draws, max(tail, _FEWEST))
    even = rows.max(-1) - np.partition(rows, lowest, -1)[:, lowest] < _EVEN
    log, khat = rows - logsumexp(rows, axis=-1, keepdims=True), np.where(even, 0.0, np.inf)
    if tail >= _FEWEST and not even.all():
        log[~even], khat[~even] = _smooth(rows[~even])
    return log.reshape(log_weights.shape), np.where(np.isnan(khat), np.inf, khat).reshape(shape)


def _smooth(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if _is_first_generation():
        import arviz as az

        log, khat = az.psislw(rows)
    else:  # 1.x takes log likelihoods here and negates them itself
        log, khat = importlib.import_module("arviz_stats.base").array_stats.psislw(-rows)
    return np.asarray(log), np.asarray(khat)
