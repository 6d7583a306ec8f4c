"""The two ArviZ generations behind one face: 0.x with InferenceData, 1.x with DataTree."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["group_container", "psis"]


def _is_first_generation() -> bool:
    import arviz as az

    return bool(az.__version__.startswith("0."))


def group_container(groups: Mapping[str, xr.Dataset]) -> Any:
    """The datasets as InferenceData (0.x) or DataTree (1.x)."""
    if _is_first_generation():
        import arviz as az

        return az.InferenceData(**groups)
    return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log weights that sum to 1 over S, and k̂, of log weights (…, S)."""
    if _is_first_generation():
        import arviz as az

        log, khat = az.psislw(log_weights)
        return np.asarray(log), np.asarray(khat)
    # 1.x takes log likelihoods here and negates them itself.
    log, khat = importlib.import_module("arviz_stats.base").array_stats.psislw(-log_weights)
    return np.asarray(log), np.asarray(khat)
