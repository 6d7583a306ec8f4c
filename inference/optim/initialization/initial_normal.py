"""Normals to start at, Laplace's at a mode and Pathfinder's along a path, and the guide placed at one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from inference.model.log_joint import LatentLayout, LogJoint
from inference.model.protocols import HasScaleTril, supports
from inference.optim.initialization.mode_search import Iterate, absolute_inverse, climb

__all__ = [
    "DENSE",
    "DRAWS",
    "RISING",
    "InitialNormal",
    "NoInitialNormal",
    "absolute_covariance",
    "laplace",
    "laplace_at",
    "located",
    "normal_at",
    "pathfinder",
    "place_guide",
    "start_at",
]

DENSE = 300  # latents with a full covariance
DRAWS = 30  # of a Normal, for its ELBO
RISING = 2.0  # nats that the next step would gain where a path ended: it is not near a mode
_NEWTON, _PRODUCTS = 12, 1500  # steps at most, and Hessian-vector products that they may cost
_PROBES = 30
_FLAT = 1e-3  # nats that it would gain at a mode, where Newton's steps are not taken
_THINNED, _ROUGH, _FINE = 10, 5, 3  # iterates of a path that are looked at, draws for each, and how many are kept


@dataclass(frozen=True)
class InitialNormal:
    """A Normal over the unconstrained latents u, in double precision, in the order in which the guide lays them out.

    ``loc`` is (D,); ``scale_tril``, (D, D), the Cholesky factor of its
    covariance, None above 300 latents; ``sd`` = 1/√(−H_ii), (D,), the spread of
    each latent given the others. ``log_joint`` is the log density at ``loc``
    and ``elbo`` the Normal's own, estimated from 30 draws, both in nats; −∞ where
    the density ends within its reach.
    ``is_mode`` says that ``loc`` is a mode and the Normal Laplace's; else it is
    an iterate of the search, Pathfinder's answer. ``evaluations`` counts
    densities, gradients and Hessian-vector products.
    """

    loc: Tensor
    scale_tril: Tensor | None
    sd: Tensor
    log_joint: float
    elbo: float
    is_mode: bool
    evaluations: int

    def draw(self, noise: Tensor) -> Tensor:
        """U from N(0, 1) ``noise``, both (…, D)."""
        spread = noise * self.sd if self.scale_tril is None else noise @ self.scale_tril.T
        return self.loc + spread

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], device: torch.device) -> InitialNormal:
        """Return the Normal whose fields were saved, its tensors on ``device``."""
        moved: dict[str, Any] = {n: part.to(device) if isinstance(part, Tensor) else part for n, part in saved.items()}
        return cls(**moved)

    @property
    def log_evidence(self) -> float:
        """Log p(x) in nats, if the log joint were the quadratic that it is at its mode."""
        tril = self.scale_tril
        log_det = self.sd.log().sum() if tril is None else tril.diagonal().log().sum()
        return self.log_joint + log_det.item() + len(self.loc) / 2 * math.log(2 * math.pi)


@dataclass(frozen=True)
class NoInitialNormal:
    """Why a guide has to keep its own start."""

    reason: str
    evaluations: int = 0


def laplace(density: LogJoint, end: Iterate, noise: Tensor) -> InitialNormal:
    """Return the Normal by the curvature at the end of a path, after Newton's steps where they are affordable."""
    gain = end.grad @ end.covariance(end.grad)
    if density.size > DENSE:
        return normal_at(density, end.u, variances(density, end.u), noise, bool(gain < _FLAT), end.value)
    top = climb(density, end.u, 0 if gain > RISING else min(_NEWTON, _PRODUCTS // density.size))
    covariance = absolute_inverse(torch.nan_to_num(top.hessian, 0.0, 0.0, 0.0), 1e-12 if top.is_mode else 1e-6)
    return normal_at(density, top.u, covariance, noise, top.is_mode, top.value)


def laplace_at(density: LogJoint, u: Tensor) -> InitialNormal | NoInitialNormal:
    """Return the Normal at ``u``, (D,), with the curvature that the density has there."""
    value, grad = density.slope(u)
    if not (math.isfinite(value) and torch.isfinite(grad).all()):
        return NoInitialNormal("log p(x, z) or its gradient is not finite there")
    metric = absolute_covariance(density, u)
    is_mode = bool(grad @ (metric @ grad if metric.dim() == 2 else metric * grad) < _FLAT)
    return normal_at(density, u, metric, density.noise(DRAWS), is_mode, value)


def absolute_covariance(density: LogJoint, u: Tensor) -> Tensor:
    """|H|⁻¹ at ``u``, (D, D), or 1/|H_ii|, (D,), for more than 300 latents."""
    if density.size <= DENSE:
        return absolute_inverse(torch.nan_to_num(density.hessian(u), 0.0, 0.0, 0.0))
    return variances(density, u)


def variances(density: LogJoint, u: Tensor) -> Tensor:
    """1/|H_ii|, (D,), estimated from random signs v as the mean of v ⊙ Hv (Bekas, Kokiopoulou, Saad 2007)."""
    signs = density.noise(_PROBES).sign()
    sizes = torch.nan_to_num((signs * density.products(u, signs)).mean(0).abs(), 0.0, 0.0, 0.0)
    known = sizes > 0
    return torch.where(known, sizes, sizes[known].median() if known.any() else torch.ones(())).reciprocal()


def normal_at(
    density: LogJoint, loc: Tensor, covariance: Tensor, noise: Tensor, is_mode: bool, log_joint: float
) -> InitialNormal:
    """N(loc, covariance) with its ELBO, −∞ where the covariance has no Cholesky factor."""
    if covariance.dim() == 1:
        start = InitialNormal(loc, None, covariance.sqrt(), log_joint, -math.inf, is_mode, 0)
        log_det = start.sd.log().sum()
    else:
        sizes = covariance.diagonal().sqrt()
        tril, failed = torch.linalg.cholesky_ex(covariance / sizes[:, None] / sizes)
        tril = sizes[:, None] * tril
        if failed or not torch.isfinite(tril).all():
            return InitialNormal(loc, None, sizes, log_joint, -math.inf, False, 0)
        precision = torch.cholesky_inverse(tril)
        start = InitialNormal(loc, tril, precision.diagonal().rsqrt(), log_joint, -math.inf, is_mode, 0)
        log_det = tril.diagonal().log().sum()
    entropy = (noise.square().sum(-1) / 2).mean() + log_det + density.size / 2 * math.log(2 * math.pi)
    values = [density.value(u) for u in start.draw(noise)]
    return replace(start, elbo=sum(values) / len(values) + entropy.item())


def pathfinder(density: LogJoint, paths: list[list[Iterate]], noise: Tensor) -> list[InitialNormal]:
    """Normals at the iterates with the best ELBO, by the covariance of L-BFGS, and at the best by |H|⁻¹ too.

    References
    ----------
    Zhang, Carpenter, Gelman, Vehtari (2022), Pathfinder: parallel quasi-Newton variational inference.
    """
    points = [path[i * len(path) // _THINNED] for path in paths for i in range(min(_THINNED, len(path)))]
    eye = torch.eye(density.size, dtype=torch.float64, device=noise.device)
    rough = [(normal_at(density, p.u, p.covariance(eye), noise[:_ROUGH], False, p.value), p) for p in points]
    rough.sort(key=lambda pair: -pair[0].elbo)
    finite = [pair for pair in rough[:_FINE] if math.isfinite(pair[0].elbo)]
    found = [(normal_at(density, p.u, p.covariance(eye), noise, False, p.value), p) for _, p in finite]
    if found:
        point = max(found, key=lambda pair: pair[0].elbo)[1]
        found.append(
            (normal_at(density, point.u, absolute_covariance(density, point.u), noise, False, point.value), point)
        )
    return [start for start, _ in found]


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
