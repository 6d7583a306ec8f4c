"""Pathfinder: Normals along the path of L-BFGS, of which the one with the best ELBO is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inference.model.log_joint import LogJoint
from inference.optim.initialization.laplace import InitialNormal, absolute_covariance, normal_at
from inference.optim.initialization.mode_search import Iterate

__all__ = ["pathfinder"]

_THINNED, _ROUGH, _FINE = 10, 5, 3  # iterates of a path that are looked at, draws for each, and how many are kept


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
