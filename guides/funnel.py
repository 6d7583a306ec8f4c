"""Funnel flows: margins with skew and tails, whose locations and scales follow the latents before them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from guides.flow import FlowGuide, FlowLayers
from guides.initialization import InitLoc, init_loc_fn, positive

__all__ = ["FunnelFlow", "FunnelLayers", "funnel_flow"]

_BEND = 2.0  # how sharply a hinge turns


def funnel_flow(model: Callable[..., Any], *, init_loc: InitLoc = None, init_scale: float = 0.1) -> FunnelFlow:
    """q(z): z = μ + σ ⊙ U f(ε), ε ~ N(0, I), where f gives each number skew, tails and the scale that others call for.

    For hierarchical models. With x_i = S_i(ε_i) and hinges h_jk = log(1 + e^{2(x_j − c_jk)})/2, k = 1, 2,

        f_i = (x_i + Σ_{j<i} A_ij x_j) exp(Σ_{j<i} B_ij x_j + C_ijk h_jk) + Σ_{j<i} D_ijk h_jk:

    where a latent lies and how far it spreads follow those that the model draws
    before it, at one rate below a hinge and at another above. S_i is a
    sinh-arcsinh transform, for skew and for tails that are heavier or lighter
    than a Normal's. All begins as a Normal with any covariance. There are 3D²
    numbers for D latents, so up to a hundred; above, U is left out. As rich a guide
    gets near to its best where each step averages many draws, ``particles=128``.

    Parameters
    ----------
    model
        Any Pyro model; its sites are found when the guide first runs.
    init_loc, init_scale
        Where μ and every σ start, the second above 0: see :mod:`guides.initialization`.

    References
    ----------
    Neal (2003), Slice sampling (the funnel).
    Jones, Pewsey (2009), Sinh-arcsinh distributions.
    Kingma et al. (2016), Improved variational inference with inverse autoregressive flow.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> import kiln
    >>> def funnel():
    ...     log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.5))
    ...     pyro.sample("z", dist.Normal(0.0, log_scale.exp()))
    >>> posterior = kiln.fit(funnel, funnel_flow(funnel), steps=1000, engine="eager", progress=False)
    >>> draws = posterior.sample(1000)
    >>> narrow, wide = (draws["z"][chosen].std() for chosen in (draws["log_scale"] < -1, draws["log_scale"] > 1))
    >>> bool(wide > 10 * narrow)
    True
    """
    return FunnelFlow(model, FunnelLayers, init_loc_fn(init_loc), positive(init_scale, "init_scale"))


class FunnelFlow(FlowGuide):
    """A flow whose scales follow what was drawn before."""


class FunnelLayers(FlowLayers):
    """ε → y on D numbers, see :func:`funnel_flow`: one pass to draw, D passes to invert.

    S(ε) = (sinh(a) − sinh(s))/(t cosh(s)), a = t asinh(ε) + s: S(0) = 0, S′(0) = 1.
    ``skew`` and ``tail``, (D,), are s/t and log t; ``knots``, (2, D), are c;
    ``weights``, (6, D, D), of which the triangles below the diagonal count, A, B, C and D.
    f is the identity where all but the knots are 0, as they begin.

    >>> layers = FunnelLayers(2)
    >>> _ = torch.nn.init.constant_(layers.weights, 0.2), torch.nn.init.constant_(layers.skew, 0.1)
    >>> x = torch.randn(5, 2)
    >>> y = layers(x)
    >>> torch.allclose(layers.inv(y.clone()), x, atol=1e-3), layers.log_abs_det_jacobian(x, y).shape
    (True, torch.Size([5]))
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.skew, self.tail = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.knots = nn.Parameter(torch.tensor([-1.0, 1.0])[:, None].repeat(1, size))
        self.weights = nn.Parameter(torch.zeros(6, size, size))

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and the sum of the log slopes of S and of the log scales."""
        t, s = self._tails()
        a = t * torch.asinh(x) + s
        log_slope = _log_cosh(a) - _log_cosh(s) - torch.log1p(x * x) / 2
        x = (torch.sinh(a) - torch.sinh(s)) / (t * torch.cosh(s))
        inner, log_scale, outer = self._given(x, x.shape[-1])
        return (x + inner) * log_scale.exp() + outer, (log_slope + log_scale).sum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        x = y[..., :0]
        for i in range(y.shape[-1]):
            inner, log_scale, outer = (part[..., i:] for part in self._given(x, i + 1))
            x = torch.cat([x, (y[..., i : i + 1] - outer) * torch.exp(-log_scale) - inner], -1)
        t, s = self._tails()
        return torch.sinh((torch.asinh(x * t * torch.cosh(s) + torch.sinh(s)) - s) / t)

    def _tails(self) -> tuple[Tensor, Tensor]:
        """T and s, (D,) each."""
        t = self.tail.exp()
        return t, t * self.skew

    def _given(self, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """A x, the log scales and D h of the first ``count``, (…, count), given as many of x or one less."""
        known = x.shape[-1]
        seen = x.unsqueeze(-2)
        h = softplus(_BEND * (seen - self.knots[:, :known])) / _BEND
        inner, scale, outer = self.weights.tril(-1)[:, :count, :known].split((1, 3, 2))
        return _mixed(seen, inner), _mixed(torch.cat([seen, h], -2), scale), _mixed(h, outer)


def _mixed(features: Tensor, weights: Tensor) -> Tensor:
    """Σ_kj weights_kij features_kj, (…, count), of (…, K, known) and (K, count, known), as one product."""
    return features.flatten(-2) @ weights.transpose(0, 1).flatten(1).T


def _log_cosh(a: Tensor) -> Tensor:
    return a.abs() + torch.log1p(torch.exp(-2 * a.abs())) - math.log(2)
