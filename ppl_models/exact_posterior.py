"""Linear regression with known noise, in closed form: the yardstick for guides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_models.scaling import Scaling

__all__ = ["ExactPosterior", "exact_linear_regression"]


@dataclass(frozen=True)
class ExactPosterior:
    """N(mean, covariance) over the weights and then the bias, where there is one, and log p(y) in nats."""

    mean: Tensor
    covariance: Tensor
    log_evidence: float
    intercept: bool = True

    def guide(self, *_: object) -> None:
        """A guide for :func:`~ppl_models.linear_regression` that has nothing to learn: it draws from this posterior.

        ``fit(partial(linear_regression, noise=noise), exact.guide, x, y, steps=1)``
        is then a posterior as any other, to predict with and to export.
        """
        kind = torch.get_default_dtype()
        inputs = len(self.mean) - self.intercept
        loc, among = self.mean[:inputs], self.covariance[:inputs, :inputs]
        weights = pyro.sample("weights", dist.MultivariateNormal(loc.to(kind), among.to(kind)))
        if self.intercept:
            slope = torch.linalg.solve(among, self.covariance[:inputs, -1])
            scale = (self.covariance[-1, -1] - self.covariance[-1, :inputs] @ slope).sqrt()
            pyro.sample(
                "bias", dist.Normal(self.mean[-1].to(kind) + (weights - loc.to(kind)) @ slope.to(kind), scale.to(kind))
            )


def exact_linear_regression(
    x: Any,
    y: Any,
    *,
    noise: float,
    prior_scale: float = 1.0,
    intercept: bool = True,
    scaling: Scaling | Mapping[str, Any] | None = None,
) -> ExactPosterior:
    """The posterior of :func:`~ppl_models.linear_regression` under the same options, σ = ``noise`` known.

    With the design A (N, D or D + 1), targets t and β ~ N(0, τ²I):
    Σ = (AᵀA/σ² + I/τ²)⁻¹, μ = ΣAᵀt/σ², log p(y) = log N(t; 0, σ²I + τ²AAᵀ).

    Parameters
    ----------
    x, y
        (N, D) and (N,).
    noise, prior_scale, intercept, scaling
        σ in the units of y, τ, and the rest as for the model.

    Returns
    -------
    ExactPosterior
        In double precision.

    Raises
    ------
    ValueError
        If ``noise`` or ``prior_scale`` is not above 0.

    References
    ----------
    Bishop (2006), Pattern recognition and machine learning, sections 3.3 and 3.5.

    Examples
    --------
    >>> exact = exact_linear_regression([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0], noise=0.1, prior_scale=10.0)
    >>> exact.mean.round(decimals=2).tolist(), exact.covariance.shape
    ([2.0, 1.0], torch.Size([2, 2]))
    """
    numbers: dict[str, Any] = {"noise": noise, "prior_scale": prior_scale}
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name} is {value!r}: the closed form needs a number above 0")
    units = Scaling.read(scaling)
    columns = units.inputs(torch.as_tensor(np.asarray(x, dtype=float)))
    ones = [torch.ones(len(columns), 1, dtype=torch.float64)] if intercept else []
    design = units.y_scale * torch.cat([columns, *ones], -1)
    target = torch.as_tensor(np.asarray(y, dtype=float)) - units.y_loc
    eye = torch.eye(design.shape[1], dtype=torch.float64)
    covariance = torch.linalg.inv(design.T @ design / noise**2 + eye / prior_scale**2)
    marginal = torch.distributions.LowRankMultivariateNormal(
        torch.zeros_like(target), design * prior_scale, torch.full_like(target, noise**2)
    )
    return ExactPosterior(
        covariance @ (design.T @ target) / noise**2, covariance, float(marginal.log_prob(target)), intercept
    )
