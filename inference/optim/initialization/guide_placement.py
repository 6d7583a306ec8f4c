"""A guide put where a start says: the parameters of each family that come nearest to its Normal."""

from __future__ import annotations

from dataclasses import replace

import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from inference.model.bound_model import BoundModel, name_of
from inference.model.elbo import Model
from inference.model.log_joint import LatentLayout
from inference.model.protocols import HasScaleTril, supports
from inference.optim.initialization.initial_normal import InitialNormal

__all__ = ["located", "place_guide", "start_at"]


def place_guide(bound_model: BoundModel, start: InitialNormal) -> Tensor:
    """θ, (P,), with the guide at ``start``; the model's own parameters stay where the program has them.

    Every family gets μ = ``loc``. Independent Normals get σ = ``sd``, the optimum
    of KL(q ‖ p) where p is the start's Normal; a full-rank Normal and the
    triangle behind a flow's layers its Cholesky factor; a low-rank one the leading
    eigenvectors of Σ, in units of ``sd``, and what is left in its s.

    Raises
    ------
    ValueError
        If the guide is of another family.

    References
    ----------
    Tipping, Bishop (1999), Probabilistic principal component analysis (low rank).
    """
    return _replaced(bound_model, {**_location(bound_model.guide, start.loc), **_spread(bound_model.guide, start)})


def located(bound_model: BoundModel, u: Tensor) -> Tensor:
    """θ, (P,), with the location μ of the guide at ``u``, (D,), its spread and the rest as the program has them.

    Raises
    ------
    ValueError
        If the guide has no location.
    """
    return _replaced(bound_model, _location(bound_model.guide, u))


def start_at(bound_model: BoundModel, start: InitialNormal, theta: Tensor) -> InitialNormal:
    """``start`` with the triangle that the guide has at ``theta``, for a map of coordinates by what it has learned."""
    prefix = getattr(bound_model.guide, "_pyro_name", "")
    found = bound_model.params.constrained(theta.double())
    tril = found[f"{prefix}.scale"][:, None] * found[f"{prefix}.scale_tril"]
    return replace(start, sd=torch.cholesky_inverse(tril).diagonal().rsqrt(), scale_tril=tril)


def _replaced(bound_model: BoundModel, values: dict[str, Tensor]) -> Tensor:
    prefix = getattr(bound_model.guide, "_pyro_name", "")
    names = {f"{prefix}.{name}": value for name, value in values.items()}
    if not values or not names.keys() <= set(bound_model.params.names):
        guide = name_of(bound_model.guide)
        raise ValueError(f"{guide} has no location and scale that a start could set: leave it where it is")
    return bound_model.params.replaced(bound_model.params.flatten(), names)


def _location(guide: Model, u: Tensor) -> dict[str, Tensor]:
    places = LatentLayout.of(guide)
    if isinstance(guide, AutoDelta):
        return places.values(u)[0]
    if isinstance(guide, AutoNormal):
        return {f"locs.{name}": value for name, value in places.named(u).items()}
    return {"loc": u} if isinstance(guide, AutoContinuous) else {}


def _spread(guide: Model, start: InitialNormal) -> dict[str, Tensor]:
    if isinstance(guide, AutoNormal):
        return {f"scales.{name}": value for name, value in LatentLayout.of(guide).named(start.sd).items()}
    if not isinstance(guide, AutoContinuous) or isinstance(guide, AutoLaplaceApproximation):
        return {}
    if supports(guide, HasScaleTril):
        tril = start.sd.diag() if start.scale_tril is None else start.scale_tril
        return {"scale": tril.diagonal(), "scale_tril": tril / tril.diagonal()[:, None]}
    if isinstance(guide, AutoLowRankMultivariateNormal):
        return _low_rank(start, guide.rank)
    return {"scale": start.sd}


def _low_rank(start: InitialNormal, rank: int) -> dict[str, Tensor]:
    """S, (D,), and F, (D, rank), from the eigenvalues of Σ/(sd sdᵀ): the largest, and the harmonic mean of the rest."""
    size = len(start.sd)
    if start.scale_tril is None:
        return {"scale": start.sd, "cov_factor": torch.zeros(size, rank, dtype=torch.float64)}
    scaled = start.scale_tril / start.sd[:, None]
    values, axes = torch.linalg.eigh(scaled @ scaled.T)
    kept = min(rank, size - 1)
    rest = 1 / (1 / values[: size - kept]).mean()
    factor = axes.new_zeros(size, rank)
    factor[:, :kept] = axes[:, size - kept :] * (values[size - kept :] / rest - 1).clamp_min(0).sqrt()
    return {"scale": start.sd * rest.sqrt(), "cov_factor": factor}
