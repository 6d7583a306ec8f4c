"""A normalizing flow as a guide: a Normal base, layers over it, then a place: location, scale and correlations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from pyro.infer.autoguide import AutoContinuous, AutoNormalizingFlow
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from guides.affine_transform import LowerTriangularAffine

__all__ = ["FlowDistribution", "FlowGuide", "FlowLayers"]

_CORRELATED = 100  # latents up to which what the layers give is correlated by a triangle
_DRAWS = 20_000  # for medians and quantiles, whose error is then at most 0.0035 in the share below


class FlowGuide(AutoNormalizingFlow):
    """q(z): z = μ + σ ⊙ U f(ε), ε ~ N(0, I), over the unconstrained latents, where f are the layers.

    Pyro's AutoNormalizingFlow with a start (μ, σ and U are learned; μ and σ
    begin where the caller says, U as the identity), a density at every point,
    and medians and quantiles. U is unit lower triangular, so that every Normal
    is in the family; above 100 latents there is none. ``layers`` makes f for a
    number of latents.

    References
    ----------
    Rezende, Mohamed (2015), Variational inference with normalizing flows.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        layers: Callable[[int], nn.Module],
        init_loc_fn: Callable[..., Tensor],
        init_scale: float,
    ) -> None:
        super().__init__(model, layers)
        AutoContinuous.__init__(self, model, init_loc_fn)  # Pyro's own start is fixed
        self._init_scale = init_scale

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.loc = nn.Parameter(self._init_loc())
        self.scale = PyroParam(torch.full_like(self.loc, self._init_scale), constraints.softplus_positive)
        if self.latent_dim <= _CORRELATED:
            eye = torch.eye(self.latent_dim, dtype=self.loc.dtype, device=self.loc.device)
            self.scale_tril = PyroParam(eye, constraints.unit_lower_cholesky)
        self.transform = self._init_transform_fn(self.latent_dim)

    def get_base_dist(self) -> Any:
        """N(0, I)."""
        return dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """ε → μ + σ ⊙ U f(ε)."""
        return dist.transforms.ComposeTransform([self.transform, self._place()])

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """q over the vector of all unconstrained latents."""
        return FlowDistribution(self.get_base_dist(), [self.transform, self._place()])

    def _place(self) -> Transform:
        if self.latent_dim <= _CORRELATED:
            return LowerTriangularAffine(self.loc, self.scale, self.scale_tril)
        place: Transform = dist.transforms.AffineTransform(self.loc, self.scale, cache_size=1, event_dim=1)
        return place

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent, ``{site: value}``, as :meth:`quantiles` finds it."""
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each unconstrained latent, brought back to its own space: ``{site: (Q, *site shape)}``.

        A flow has no formula for them: they are those of 20,000 draws, the same
        at every call.
        """
        generator = torch.Generator(self.loc.device).manual_seed(0)
        noise = torch.randn(_DRAWS, self.latent_dim, dtype=self.loc.dtype, device=self.loc.device, generator=generator)
        draws = self.get_transform(*args, **kwargs)(noise)
        wanted = torch.as_tensor(quantiles, dtype=self.loc.dtype, device=self.loc.device)
        found: dict[str, list[Tensor]] = {}
        for latent in torch.quantile(draws, wanted, 0):
            for site, value in self._unpack_latent(latent):
                found.setdefault(site["name"], []).append(biject_to(site["fn"].support)(value))
        return {name: torch.stack(values) for name, values in found.items()}


class FlowDistribution(dist.TransformedDistribution):
    """The density of a flow's draws.

    ``transforms`` are the layers f and a :class:`~guides.affine_transform.LowerTriangularAffine`.
    """

    def fixed(self) -> _Fixed:
        """Return this density with its parameters cut off from their gradient."""
        return _Fixed(self)


class _Fixed:
    """log q(z) whose gradient is by z alone, at a z that was just drawn.

    With y = f(x) and J = ∂f/∂x it is ∇_y log q = J⁻ᵀ(∇_x log N(x; 0, I) − ∇_x log |det J|).
    All rows of J and the last term come from one pass over D + 1 copies of x.

    References
    ----------
    Agrawal, Sheldon, Domke (2020), Advances in black-box VI: normalizing flows, importance weighting, and optimization.
    Vaitl, Nicoli, Nakajima, Kessel (2022), Gradients should stay on path.
    """

    def __init__(self, flow: FlowDistribution) -> None:
        self._flow = flow

    def log_prob(self, z: Tensor) -> Tensor:
        """The shape of z, (…, D), without its last dimension."""
        layers, place = self._flow.transforms
        x = layers.inv(place.inv(z)).detach()
        y = place.detached().inv(z)
        with torch.enable_grad():
            points = x.expand(x.shape[-1] + 1, *x.shape).clone().requires_grad_(True)
            moved, log_det = layers.moved(points)
            (slopes,) = torch.autograd.grad(moved[:-1].diagonal(0, 0, -1).sum() + log_det[-1].sum(), points)
        pulled = (-x - slopes[-1]).unsqueeze(-1)
        slope = torch.linalg.solve(slopes[:-1].movedim(0, -1), pulled).squeeze(-1)
        value = self._flow.base_dist.log_prob(x) - log_det[-1] - place.log_abs_det_jacobian(x, z)
        return value.detach() + (slope.detach() * (y - y.detach())).sum(-1)


class FlowLayers(TransformModule):
    """The layers f of a flow: a subclass says how a point moves, ``moved(x)``, and how it comes back, ``_inverse(y)``.

    What a draw's log determinant is was found on its way; it is kept for the
    density of that draw.
    """

    bijective = True
    domain = codomain = constraints.real_vector

    def __init__(self) -> None:
        super().__init__(cache_size=1)
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x), the shape of x, and log |det ∂f/∂x|, that shape without its last dimension."""
        raise NotImplementedError

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det ∂f/∂x|, the shape of x without its last dimension."""
        seen, log_det = self._last
        return log_det if seen is x and log_det is not None else self.moved(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.moved(x)
        self._last = (x, log_det)
        return y

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_cached_x_y": (None, None), "_last": (None, None)}
