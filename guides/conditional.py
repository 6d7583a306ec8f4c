"""A guide that knows the sites in which a model is linear given all others: the last layer of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

from guides.initialization import count
from guides.linear_model import LinearModel, run_in_units
from guides.mean_field import mean_field_normal
from guides.plates import model_structure, row_count

__all__ = ["ConditionalNormal", "conditional_normal"]

Builder = Callable[[Callable[..., Any]], Callable[..., Any]]
_ONE = torch.Size()
_PAIRS, _ROUNDING = 4, 1e-4


def conditional_normal(
    model: Callable[..., Any], linear: Sequence[str], *, others: Builder = mean_field_normal, points: int = 100
) -> ConditionalNormal:
    """q(z, v) = q(z) q(v | z), v the sites in which the mean of the observations is affine given z.

    q(v | z) ∝ p(v | z) Πₘ N(ỹₘ; f(x̃ₘ; z, v), (sₘ σₘ)²), ỹₘ = yₘ + tₘ σₘ, is Normal, and known
    in closed form: f and σ are what the model says of the rows x̃, y of the data. The shifts
    t and spreads s are learned, from 0 and √(points/N): with all rows, s = 1 and t = 0 it
    is the posterior of v given z itself. It moves with z, where independent
    weights would have to give way to each other; the noise of a regression, which
    otherwise takes on what they cannot fit, is then found from few rows.

    The guide keeps the rows x̃, y as parameters that are not learned, ``rows.…``:
    they are in the folder of a saved posterior. A step runs the model at D + 1 further
    points for D numbers in v. It is fitted by Adam, and ``posterior.log_prob`` is not
    there where q(z) draws in another space, as Pyro's AutoNormal does.

    Parameters
    ----------
    model
        A model of real rows whose observations are Normal, such as
        ``partial(bnn_regression, noise="learned")``.
    linear
        Names of the sites v, with Normal priors, as ``["w2", "b2"]``, the last
        layer of a network with two hidden ones.
    others
        What makes q(z), a builder such as :func:`mean_field_normal` or
        ``partial(low_rank_normal, rank=5)``.
    points
        Rows that are kept, evenly spread over those of the fit, at most.

    Raises
    ------
    ValueError
        If ``linear`` names no site or ``points`` is not a whole number above 0. At the
        first call: if a name is no latent site, its prior is not Normal, the mean
        is not affine in the sites together, an observed site is not Normal, or a
        column of the data has no real numbers.

    References
    ----------
    Ober, Aitchison (2021), Global inducing point variational posteriors for Bayesian neural networks and deep
    Gaussian processes.
    Snoek et al. (2015), Scalable Bayesian optimization using deep neural networks (a last layer in closed form).

    Examples
    --------
    >>> import torch
    >>> import kiln
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
    >>> guide = conditional_normal(linear_regression, ["weights", "bias"])
    >>> y = 2 * x[:, 0] + 0.1 * torch.sin(40 * x[:, 0])
    >>> posterior = kiln.fit(linear_regression, guide, x, y, steps=100, lr=0.05, progress=False)
    >>> bool((posterior.sample(500)["weights"].mean() - 2).abs() < 0.1)
    True
    """
    if isinstance(linear, str) or not linear:
        raise ValueError(f"linear is {linear!r}: name the sites, as in linear=['w2', 'b2']")
    return ConditionalNormal(model, tuple(linear), others, count(points, "points"))


class ConditionalNormal(nn.Module):
    """The guide of :func:`conditional_normal`."""

    def __init__(self, model: Callable[..., Any], linear: tuple[str, ...], others: Builder, points: int) -> None:
        super().__init__()
        self.linear = linear
        self.points = points
        self.others = others(poutine.block(model, hide=list(linear)))
        self._model = [model]  # not a submodule: its parameters are the model's
        self._builder = others
        self._total = 0
        self._places: tuple[int, ...] = ()

    def forward(self, *args: Any) -> dict[str, Tensor]:
        """Draw z by the other guide, then the sites v one after the other."""
        is_first = not self._places
        if is_first:
            self._set_up(args)
        rows = self._rows(args)
        z: dict[str, Tensor] = self.others(*args)
        if is_first:
            self._refuse_curved(z, rows)
        return z | self._draw(z, rows)

    def _draw(self, z: Mapping[str, Tensor], rows: tuple[Any, ...]) -> dict[str, Tensor]:
        """Draw v, in units of its prior e = μ + L⁻ᵀε with LLᵀ = I + WᵀW, from the last site to the first."""
        base, w, r = self._equations(z, rows)
        tril = torch.linalg.cholesky(torch.eye(w.shape[1], dtype=w.dtype, device=w.device) + w.T @ w)
        mean = torch.cholesky_solve((w.T @ r)[:, None], tril)[:, 0]
        values: dict[str, Tensor] = {}
        off = mean.new_zeros(0)  # how far the sites that are drawn lie from their mean
        for name, part in reversed(base.parts.items()):
            corner = tril[part, part]
            pull = torch.linalg.solve_triangular(corner.T, (tril[part.stop :, part].T @ off)[:, None], upper=True)
            normal = _Conditional(base.priors[name], mean[part] - pull[:, 0], corner)
            values[name] = pyro.sample(name, normal)
            off = torch.cat([normal.in_units(values[name]) - mean[part], off])
        return values

    def _equations(self, z: Mapping[str, Tensor], rows: tuple[Any, ...]) -> tuple[LinearModel, Tensor, Tensor]:
        """The model at e = 0, and W, (M, D), and r, (M,): the M kept observations are r = We + N(0, 1)."""
        base = self._run(z, rows, torch.zeros(()))
        size, least = len(base.loc), math.sqrt(row_count(rows) / self._total)
        shift = pyro.param("rows.shift", lambda: base.loc.new_zeros(size))
        spread = pyro.param("rows.spread", lambda: base.loc.new_full((size,), least), constraint=constraints.positive)

        def moved(e: Tensor) -> Tensor:
            return self._run(z, rows, e).loc - base.loc

        units = torch.eye(base.size, dtype=base.loc.dtype, device=base.loc.device)
        width = (spread * base.scale).double()
        w = torch.vmap(moved)(units).T.double() / width[:, None]
        return base, w, (base.value - base.loc).double() / width + (shift / spread).double()

    def _rows(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``args`` with the kept rows in the place of their own."""
        found = list(args)
        for i in self._places:
            found[i] = pyro.param(f"rows.{i}", lambda i=i: self._chosen(args[i])).detach()
        return tuple(found)

    def _chosen(self, rows: Tensor) -> Tensor:
        kept = torch.linspace(0, len(rows) - 1, min(len(rows), self.points)).round().long()
        return rows[kept.to(rows.device)].detach().clone()

    def _run(self, z: Mapping[str, Tensor], rows: tuple[Any, ...], e: Tensor) -> LinearModel:
        return run_in_units(self._model[0], rows, z, self.linear, e)

    def _set_up(self, args: tuple[Any, ...]) -> None:
        """Find the arguments with a row an observation, and refuse latents that the guide cannot draw."""
        latents = model_structure(self._model[0], args)
        unknown = [name for name in self.linear if name not in latents.latents]
        own = [name for name in latents.latents if latents.is_of_rows(name)]
        if unknown:
            raise ValueError(
                f"linear names {unknown[0]!r}, which is no latent site: name some of {list(latents.latents)}"
            )
        if own:
            raise ValueError(f"each row has the latents {own} of its own: conditional_normal is for shared ones alone")
        self._total = row_count(args)
        found = [i for i, v in enumerate(args) if isinstance(v, Tensor) and v.dim() and len(v) == self._total]
        for i in found:
            if not args[i].is_floating_point():
                raise ValueError(
                    f"argument {i + 1} of the model is {args[i].dtype}: conditional_normal needs real rows"
                )
        self._places = tuple(found)

    def _refuse_curved(self, z: Mapping[str, Tensor], rows: tuple[Any, ...]) -> None:
        """Compare f(a + b) − f(a) with f(b) − f(0) at some a and b."""
        base = self._run(z, rows, torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        for _ in range(_PAIRS):
            a, b = torch.randn(2, base.size, generator=generator).to(base.loc)
            first, second = (self._run(z, rows, e).loc for e in (a, b))
            both = self._run(z, rows, a + b).loc
            bent = (both - first - second + base.loc).abs().max()
            if not bent <= _ROUNDING * (1 + base.scale.max() + both.abs().max() + first.abs().max()):
                raise ValueError(
                    f"the mean of the observations is not affine in {list(self.linear)} together, given the other "
                    "sites: name the weights and biases of the last layer alone"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> ConditionalNormal:
        twin = ConditionalNormal(self._model[0], self.linear, self._builder, self.points)
        return twin.train(self.training)


class _Conditional(dist.TorchDistribution):
    """v = m + s ⊙ e, e ~ N(loc, (LLᵀ)⁻¹), in the shape of its prior N(m, s²)."""

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, prior: dist.Normal, loc: Tensor, tril: Tensor) -> None:
        super().__init__(event_shape=prior.mean.shape, validate_args=False)
        self.prior = prior
        self.loc = loc
        self.tril = tril

    @property
    def support(self) -> constraints.Constraint:
        """All real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def in_units(self, value: Tensor) -> Tensor:
        """e at v = ``value``, (D,)."""
        return ((value - self.prior.mean) / self.prior.stddev).reshape(-1).to(self.loc)

    def rsample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """Draw v; ``sample_shape`` is (), as Pyro asks for."""
        noise = torch.randn((*sample_shape, len(self.loc)), dtype=self.prior.mean.dtype, device=self.loc.device)
        spread = torch.linalg.solve_triangular(self.tril.T, noise.to(self.loc)[..., None], upper=True)[..., 0]
        units = (self.loc + spread).to(self.prior.mean).reshape(sample_shape + self.event_shape)
        return self.prior.mean + self.prior.stddev * units

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of the whole site."""
        noise = self.tril.T @ (self.in_units(value) - self.loc)
        size = math.log(2 * math.pi) * len(noise)
        change = self.tril.diagonal().log().sum() - self.prior.stddev.log().sum()
        return (change - (noise.square().sum() + size) / 2).to(value)
