"""The top of a smooth density: L-BFGS from afar, damped Newton steps near by, whatever the scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Climbed", "Iterate", "Surface", "absolute_inverse", "ascend", "climb"]

_MEMORY = 30
_TRIES = 20
_NEAR = 1e-4  # nats that a quadratic step would still gain, where L-BFGS hands over
_THERE = 1e-7  # where Newton's steps end: the mode is then 0.0005 sd away at most
_FAINT = 1e-12  # of a scaled eigenvalue: a direction that the density doesn't know


class Surface(Protocol):
    """A log density of u, (D,), with derivatives."""

    def slope(self, u: Tensor) -> tuple[float, Tensor]:
        """The value, −∞ where it is none, and the gradient."""

    def hessian(self, u: Tensor) -> Tensor:
        """Second derivatives, (D, D)."""


@dataclass(frozen=True)
class Iterate:
    """A point of an L-BFGS path with its log density, its gradient, and what the steps up to it say of the curvature.

    ``metric`` is the inverse Hessian that the path began with, (D, D), or its
    diagonal, (D,).
    """

    u: Tensor
    value: float
    grad: Tensor
    metric: Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...]

    def covariance(self, v: Tensor) -> Tensor:
        """(−Hessian)⁻¹ v as L-BFGS estimates it, positive definite; v is (D,) or (D, M)."""
        columns = v[:, None] if v.dim() == 1 else v
        shares = []
        for s, y in reversed(self.pairs):
            share = (s @ columns) / (s @ y)
            columns = columns - y[:, None] * share
            shares.append(share)
        columns = self.metric[:, None] * columns if self.metric.dim() == 1 else self.metric @ columns
        if self.pairs:
            s, y = self.pairs[-1]
            spread = self.metric * y if self.metric.dim() == 1 else self.metric @ y
            columns = columns * (s @ y) / (y @ spread)
        for (s, y), share in zip(self.pairs, reversed(shares), strict=True):
            columns = columns + s[:, None] * (share - (y @ columns) / (s @ y))
        return columns[:, 0] if v.dim() == 1 else columns


@dataclass(frozen=True)
class Climbed:
    """Where Newton's steps ended: ``is_mode`` if the gradient vanished there and every curvature is downwards."""

    u: Tensor
    value: float
    hessian: Tensor
    is_mode: bool


def ascend(surface: Surface, start: Tensor, metric: Tensor, most: int) -> list[Iterate]:
    """The path of L-BFGS from ``start``, ``most`` steps at most; empty if the density is none there.

    References
    ----------
    Nocedal, Wright (2006), Numerical optimization, section 7.2.
    """
    value, grad = surface.slope(start)
    if not _is_usable(value, grad):
        return []
    path = [Iterate(start, value, grad, metric, ())]
    for _ in range(most):
        last = path[-1]
        step = last.covariance(last.grad)
        if not last.grad @ step > 2 * _NEAR:
            break
        found = _search(surface, last, step)
        if found is None:
            break
        u, value, grad = found
        s, y = u - last.u, last.grad - grad
        pairs = last.pairs
        if s @ y > 1e-10 * s.norm() * y.norm():
            pairs = (*pairs, (s, y))[-_MEMORY:]
        path.append(Iterate(u, value, grad, metric, pairs))
    return path


def _search(surface: Surface, last: Iterate, step: Tensor) -> tuple[Tensor, float, Tensor] | None:
    """A point along ``step`` that meets the weak Wolfe conditions, by bisection (Lewis, Overton 2013)."""
    rise = float(last.grad @ step)
    low, high, t = 0.0, math.inf, 1.0
    best: tuple[Tensor, float, Tensor] | None = None
    for _ in range(_TRIES):
        u = last.u + t * step
        value, grad = surface.slope(u)
        if not (_is_usable(value, grad) and value >= last.value + 1e-4 * t * rise):
            high = t
        else:
            best, low = (u, value, grad), t
            if grad @ step <= 0.9 * rise:
                return best
        t = (low + high) / 2 if math.isfinite(high) else 2 * low
    return best


def climb(surface: Surface, start: Tensor, most: int) -> Climbed:
    """Newton's steps from ``start``, damped where they don't rise, each eigenvalue of the Hessian by its size.

    The Hessian is scaled to a diagonal of ±1 first, so that units don't matter.

    References
    ----------
    Dauphin et al. (2014), Identifying and attacking the saddle point problem (|λ| for λ).
    """
    u, damping = start, 0.0
    value, grad = surface.slope(u)
    hessian = surface.hessian(u)
    for _ in range(most):
        if not (torch.isfinite(hessian).all() and _is_usable(value, grad)):
            break
        scale, curvatures, axes = _spectrum(hessian)
        along = axes.T @ (scale * grad)
        gain = (along.square() / curvatures.abs().clamp_min(_FAINT)).sum() / 2
        if gain < _THERE:
            return Climbed(u, value, hessian, bool(curvatures.min() > _FAINT))
        for _ in range(_TRIES):
            to = u + scale * (axes @ (along / (curvatures.abs().clamp_min(_FAINT) + damping)))
            new, slope = surface.slope(to)
            if _is_usable(new, slope) and new > value:
                break
            damping = max(4 * damping, 1e-3)
        else:
            return Climbed(u, value, hessian, False)
        u, value, grad, damping = to, new, slope, 0.0 if damping < 1e-3 else damping / 10
        hessian = surface.hessian(u)
    return Climbed(u, value, hessian, False)


def absolute_inverse(hessian: Tensor, least: float = 1e-6) -> Tensor:
    """|H|⁻¹, positive definite, (D, D), from eigenvalues of the scaled Hessian not under ``least``."""
    scale, curvatures, axes = _spectrum(hessian)
    half = scale[:, None] * axes * curvatures.abs().clamp_min(least).rsqrt()
    return half @ half.T


def _spectrum(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, (D,), and the eigenvalues and eigenvectors of −S H S, whose diagonal is ±1."""
    sizes = hessian.diagonal().abs()
    scale = torch.where(sizes > 0, sizes, torch.ones_like(sizes)).rsqrt()
    curvatures, axes = torch.linalg.eigh(-scale[:, None] * hessian * scale)
    return scale, curvatures, axes


def _is_usable(value: float, grad: Tensor) -> bool:
    return math.isfinite(value) and bool(torch.isfinite(grad).all())
