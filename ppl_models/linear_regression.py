"""Bayesian linear regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from ppl_models.noise_scale import Noise, noise_scale
from ppl_models.scaling import Scaling

__all__ = ["linear_regression", "suggested_options"]


def linear_regression(
    x: Tensor,
    y: Tensor | None = None,
    *,
    noise: Noise = "learned",
    prior_scale: float = 1.0,
    intercept: bool = True,
    scaling: Scaling | Mapping[str, Any] | None = None,
) -> Tensor:
    """Y ~ N(b + x·w, σ), w ~ N(0, prior_scale²), b ~ N(0, prior_scale²).

    Parameters
    ----------
    x, y
        (N, D) and (N,).
    noise
        σ in the units of y, or ``"learned"``, the site ``noise`` ~ HalfNormal(y_scale).
    prior_scale
        Standard deviation of weights and bias, on the standardised scale.
    intercept
        Whether there is a ``bias``.
    scaling
        Standardisation of x and y, see :class:`~ppl_models.scaling.Scaling`.

    Returns
    -------
    Tensor
        The observations, (N,).
    """
    units = Scaling.read(scaling)
    columns = units.inputs(x)
    weights = pyro.sample("weights", dist.Normal(columns.new_zeros(columns.shape[1]), prior_scale).to_event(1))
    bias = pyro.sample("bias", dist.Normal(columns.new_zeros(()), prior_scale)) if intercept else 0.0
    sigma = noise_scale(noise, units.y_scale, columns)
    with pyro.plate("data", len(columns)):
        rows = pyro.subsample(columns, event_dim=1)
        observed = pyro.subsample(y, event_dim=0) if y is not None else None
        return pyro.sample("y", dist.Normal(units.target(bias + rows @ weights), sigma), obs=observed)


def suggested_options(x: Any, y: Any) -> dict[str, Any]:
    """Return the options for the command line: learned noise, and the scales of the training rows."""
    return {"noise": "learned", "scaling": Scaling.of(x, y).as_dict()}
