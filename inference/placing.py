"""A guide put where a start says: the parameters of each family that come nearest to its Normal."""

from __future__ import annotations

import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from inference.places import Places
from inference.program import Program, name_of
from inference.start import Start

__all__ = ["apply_start"]


def apply_start(program: Program, start: Start) -> Tensor:
    """θ, (P,), with the guide at ``start``; the model's own parameters stay where the program has them.

    Every family gets μ = ``loc``. Independent Normals and the μ, σ of a flow
    get σ = ``sd``, the optimum of KL(q ‖ p) where p is the start's Normal; a
    full-rank Normal its Cholesky factor; a low-rank one s = ``sd`` and, in F,
    the leading eigenvectors of Σ with s divided out.

    Raises
    ------
    ValueError
        If the guide is of another family.
    """
    guide = program.guide
    places = Places.of(guide)
    values: dict[str, Tensor] = {}
    if isinstance(guide, AutoDelta):
        values = places.values(start.loc)[0]
    elif isinstance(guide, AutoNormal):
        sites, spreads = places.named(start.loc), places.named(start.sd)
        values = {f"locs.{n}": v for n, v in sites.items()} | {f"scales.{n}": v for n, v in spreads.items()}
    elif isinstance(guide, AutoContinuous):
        values = {"loc": start.loc, **_spread(guide, start)}
    prefix = getattr(guide, "_pyro_name", "")
    names = {f"{prefix}.{name}": value for name, value in values.items()}
    if not values or not names.keys() <= set(program.params.names):
        raise ValueError(f"{name_of(guide)} has no location and scale that a start could set: leave it where it is")
    return program.params.replaced(program.params.flatten(), names)


def _spread(guide: AutoContinuous, start: Start) -> dict[str, Tensor]:
    if isinstance(guide, AutoLaplaceApproximation):
        return {}
    if isinstance(guide, AutoMultivariateNormal):
        tril = start.sd.diag() if start.scale_tril is None else start.scale_tril
        return {"scale": tril.diagonal(), "scale_tril": tril / tril.diagonal()[:, None]}
    if isinstance(guide, AutoLowRankMultivariateNormal):
        return {"scale": start.sd, "cov_factor": _factor(start, guide.rank)}
    return {"scale": start.sd}


def _factor(start: Start, rank: int) -> Tensor:
    """F, (D, rank): FFᵀ is the best such approximation of Σ/(s sᵀ) − I."""
    if start.scale_tril is None:
        return torch.zeros(len(start.sd), rank, dtype=torch.float64)
    scaled = start.scale_tril / start.sd[:, None]
    values, axes = torch.linalg.eigh(scaled @ scaled.T)
    return (axes * (values - 1).clamp_min(0).sqrt()).flip(-1)[:, :rank]
