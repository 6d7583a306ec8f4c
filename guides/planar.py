"""Planar flows: a Normal bent by one hinge after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from guides.flow import FlowGuide, FlowLayers
from guides.initialization import InitLoc, count, init_loc_fn, positive
from guides.tanh_recurrence import tanh_recurrence

__all__ = ["PlanarFlow", "PlanarLayers", "planar_flow"]

_HALVINGS = 64
_MARGIN = 1e-2  # the least slope of a layer along w; at 0 it would have no inverse


def planar_flow(
    model: Callable[..., Any], layers: int = 16, *, init_loc: InitLoc = None, init_scale: float = 0.1
) -> PlanarFlow:
    """q(z): z = μ + σ ⊙ U f_K(… f_1(ε)), ε ~ N(0, I), f_k(x) = x + û_k tanh(w_k·x + b_k).

    Over the unconstrained latents of any model. Few layers bend a Normal, some
    tens split it into modes; what they learn best is few latents (2 to 20).

    Parameters
    ----------
    model
        Any Pyro model; its sites are found when the guide first runs.
    layers
        K.
    init_loc, init_scale
        Where μ and every σ start, see :mod:`guides.initialization`.

    Raises
    ------
    ValueError
        If ``layers`` is not a whole number above 0, or ``init_scale`` not a number above 0.

    References
    ----------
    Rezende, Mohamed (2015), Variational inference with normalizing flows.

    Examples
    --------
    >>> import torch
    >>> import kiln
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(-1, 1, 40).reshape(-1, 1)
    >>> guide = planar_flow(linear_regression, layers=8)
    >>> posterior = kiln.fit(linear_regression, guide, x, 2 * x[:, 0], steps=300, progress=False)
    >>> draws = posterior.sample(100)                      # {"weights": (100, 1), "bias": (100,), "noise": (100,)}
    >>> posterior.log_prob(draws).shape
    torch.Size([100])
    """
    made = partial(PlanarLayers, count=count(layers, "layers"))
    return PlanarFlow(model, made, init_loc_fn(init_loc), positive(init_scale, "init_scale"))


class PlanarFlow(FlowGuide):
    """A flow of planar layers."""


class PlanarLayers(FlowLayers):
    """f_K ∘ … ∘ f_1 on D numbers, f_k(x) = x + û_k tanh(w_k·x + b_k), as one transform.

    û = u + (m(w·u) − w·u) w/‖w‖² keeps w·û above −1, so that each layer grows
    along w and has an inverse; m(t) = log(1 + e^(t+c)) − 1 + 0.01, with c such
    that m(0) = 0. As w_k·x_k = w_k·x + Σ_{j<k} (w_k·û_j) h_j, all layers are
    matrix products but for the h, which :func:`~guides.tanh_recurrence.tanh_recurrence` finds.

    ``u`` and ``w`` have shape (K, D), ``b`` (K,).

    >>> layers = PlanarLayers(2, count=8)
    >>> x = torch.randn(5, 2)
    >>> y = layers(x)
    >>> torch.allclose(layers.inv(y.clone()), x, atol=1e-3), layers.log_abs_det_jacobian(x, y).shape
    (True, torch.Size([5]))

    References
    ----------
    Rezende, Mohamed (2015), Variational inference with normalizing flows, equations 10 to 13 and appendix A.1.
    """

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(count, size) * 0.1)
        self.w = nn.Parameter(torch.randn(count, size) / math.sqrt(size))
        self.b = nn.Parameter(torch.randn(count))

    def constrained_u(self) -> Tensor:
        """û, shape (K, D)."""
        along = (self.w * self.u).sum(-1, keepdim=True)
        wanted = softplus(along + math.log(math.expm1(1 - _MARGIN))) - (1 - _MARGIN)
        square = (self.w * self.w).sum(-1, keepdim=True) + torch.finfo(self.w.dtype).tiny
        return self.u + (wanted - along) / square * self.w

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and Σ_k log(1 + (1 − h_k²) w_k·û_k)."""
        u = self.constrained_u()
        seen = self.w @ u.T
        points = x.reshape(-1, x.shape[-1])
        h = tanh_recurrence((self.w @ points.T + self.b[:, None]).contiguous(), seen)
        log_det = torch.log(1 + (1 - h * h) * seen.diagonal()[:, None]).sum(0)
        return x + (u.T @ h).T.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def _inverse(self, y: Tensor) -> Tensor:
        u = self.constrained_u()
        slopes = (self.w * u).sum(-1)
        for k in reversed(range(len(self.b))):
            h = torch.tanh(_root(y @ self.w[k] + self.b[k], slopes[k]))
            y = y - h[..., None] * u[k]
        return y


def _root(c: Tensor, s: Tensor) -> Tensor:
    """The a with a + s tanh(a) = c, for s > −1: a bracket halved until nothing is left of it, then Newton's step.

    That step gives the gradient of the solution too. Newton's steps alone may
    jump from one side of the bend to the other for ever.
    """
    with torch.no_grad():
        low, high = c - s.abs() - 1, c + s.abs() + 1
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = middle + s * torch.tanh(middle) > c
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        slope = 1 + s * (1 - torch.tanh(low) ** 2)
    return low - (low + s * torch.tanh(low) - c) / slope
