"""log q(z) at any point, and many draws of z at once, where a guide's form allows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide, AutoGuideList, AutoNormal
from torch import Tensor
from torch.distributions import Normal, biject_to

from inference.data.arguments import plain_tensor
from inference.model.bound_model import BoundModel
from inference.model.elbo import Model
from inference.model.sites import site_is_draw

__all__ = ["as_points", "draws_at_once", "log_density"]


def as_points(values: Mapping[str, Any], bound_model: BoundModel) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Values of every latent as ``{site: (points, *site shape)}``, and the leading dimensions that they had.

    Raises
    ------
    ValueError
        If a site is missing or unknown, a shape is not a site's with leading
        dimensions that all share, or a value is no finite number.
    """
    wanted = {site.name: site.shape for site in bound_model.latents}
    if wanted.keys() != values.keys():
        missing, unknown = sorted(wanted.keys() - values.keys()), sorted(values.keys() - wanted.keys())
        raise ValueError(f"a value of every latent is needed, {sorted(wanted)}: missing {missing}, unknown {unknown}")
    points, leading = {}, {}
    for name, shape in wanted.items():
        value = plain_tensor(values[name], name, bound_model.dtype, shared=True).to(bound_model.device)
        cut = value.dim() - len(shape)
        if cut < 0 or tuple(value.shape[cut:]) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: its last dimensions must be {shape}")
        leading[name] = tuple(value.shape[:cut])
        points[name] = value.reshape(-1, *shape)
    if len(set(leading.values())) > 1:
        raise ValueError(f"the sites have different leading dimensions, {leading}: give as many points of each")
    return points, next(iter(leading.values()))


def log_density(guide: Model, args: tuple[Any, ...], points: Mapping[str, Tensor]) -> Tensor:
    """log q(z) in nats at points ``{site: (points, *site shape)}``, in the model's space; shape (points,).

    Raises
    ------
    ValueError
        If the guide draws numbers of its own from which z comes, so that q(z) is an integral.
    """
    if isinstance(guide, AutoContinuous):
        parts, changes = zip(*(_unconstrained(points[n], s) for n, s in _latents(guide)), strict=True)
        found: Tensor = guide.get_posterior(*args).log_prob(torch.cat([part.flatten(1) for part in parts], -1))
        return found + torch.stack(changes).sum(0)
    if isinstance(guide, AutoNormal):
        return _of_normals(guide, points)
    if isinstance(guide, AutoGuideList):
        return torch.stack([log_density(part, args, points) for part in guide]).sum(0)
    rows = zip(*points.values(), strict=True)
    return torch.stack([_of_sites(guide, args, dict(zip(points, row, strict=True))) for row in rows])


def draws_at_once(guide: Model, args: tuple[Any, ...], count: int) -> dict[str, Tensor] | None:
    """``count`` draws of z as ``{site: (count, *site shape)}``; None for a guide that has to run for each."""
    if isinstance(guide, AutoContinuous):
        whole = guide.get_posterior(*args).sample((count,))
        shapes = guide._unconstrained_shapes
        pieces = whole.split([shape.numel() for shape in shapes.values()], -1)
        drawn = {name: piece.reshape(count, *shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
    elif isinstance(guide, AutoNormal):
        drawn = {name: Normal(*guide._get_loc_and_scale(name)).sample((count,)) for name, _ in _latents(guide)}
    else:
        return None
    return {name: biject_to(site["fn"].support)(drawn[name]) for name, site in _latents(guide)}


def _of_normals(guide: AutoNormal, points: Mapping[str, Tensor]) -> Tensor:
    terms = []
    for name, site in _latents(guide):
        unbounded, change = _unconstrained(points[name], site)
        loc, scale = guide._get_loc_and_scale(name)
        terms.append(Normal(loc.reshape(-1), scale.reshape(-1)).log_prob(unbounded).sum(1) + change)
    return torch.stack(terms).sum(0)


def _latents(guide: AutoGuide) -> Iterable[tuple[str, dict[str, Any]]]:
    found: Iterable[tuple[str, dict[str, Any]]] = guide.prototype_trace.iter_stochastic_nodes()
    return found


def _unconstrained(value: Tensor, site: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """U where Pyro's guides draw, with the points in front, and log |du/dz|, one number a point."""
    transform = biject_to(site["fn"].support).inv
    unbounded = transform(value)
    change = transform.log_abs_det_jacobian(value, unbounded)
    points = len(value)
    return unbounded.reshape(points, -1), change.reshape(points, -1).sum(1)


def _of_sites(guide: Model, args: tuple[Any, ...], values: dict[str, Tensor]) -> Tensor:
    trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(*args)
    drawn = [name for name, site in trace.nodes.items() if name not in values and site_is_draw(site)]
    if drawn:
        raise ValueError(f"q(z) has no density in closed form: the guide draws {drawn} beside the model's latents")
    return torch.as_tensor(trace.log_prob_sum())
