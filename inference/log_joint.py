"""The log joint of a model over its unconstrained latents, with its derivatives, in double precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import biject_to

from inference.double import InDouble
from inference.flat_priors import DrawableFlats
from inference.isolation import RandomStream
from inference.objective import log_density
from inference.program import Program

__all__ = ["LogJoint"]


@dataclass
class LogJoint:
    """log p(x, z(u)) + log |dz/du| as a function of u, (D,), where an autoguide draws, in nats.

    Scales, masks and factors count as in the ELBO; parameters of the model are
    held where the program starts. Without ``jacobian`` the second term is left
    out. ``evaluations`` counts what was asked: one for a value or a gradient, D
    for a Hessian, which is as many Hessian-vector products.
    """

    program: Program
    args: tuple[Any, ...]
    stream: RandomStream
    jacobian: bool = True
    evaluations: int = 0
    _flat: Tensor = field(init=False)
    _all_double: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.program = replace(self.program, dtype=torch.float64)
        self.args = tuple(_double(value) for value in self.args)
        self._flat = self.program.params.flatten().double()
        guide = self.program.guide
        nodes = guide.prototype_trace.iter_stochastic_nodes() if isinstance(guide, AutoGuide) else ()
        self._places = [_Place.of(name, site) for name, site in nodes]

    @property
    def size(self) -> int:
        """D, the numbers in u."""
        return sum(place.size for place in self._places)

    def value(self, u: Tensor) -> float:
        """The log joint, −∞ where it is not a number."""
        self.evaluations += 1
        with torch.no_grad(), self._running():
            return _finite(self._at(u))

    def slope(self, u: Tensor) -> tuple[float, Tensor]:
        """The log joint and its gradient, (D,)."""
        self.evaluations += 1
        at = u.detach().requires_grad_()
        with torch.enable_grad(), self._running():
            value = self._at(at)
            (grad,) = torch.autograd.grad(value, at, materialize_grads=True)
        return _finite(value.detach()), grad

    def hessian(self, u: Tensor) -> Tensor:
        """Second derivatives, (D, D).

        Raises
        ------
        RuntimeError
            If the model has an operation that cannot be differentiated twice.
        """
        self.evaluations += len(u)
        at = u.detach().requires_grad_()
        with torch.enable_grad(), self._running():
            (grad,) = torch.autograd.grad(self._at(at), at, create_graph=True, materialize_grads=True)
            rows = _rows(grad, at)
        return (rows + rows.T) / 2

    def products(self, u: Tensor, vectors: Tensor) -> Tensor:
        """Hessian times each row of ``vectors``, (M, D)."""
        self.evaluations += len(vectors)
        at = u.detach().requires_grad_()
        with torch.enable_grad(), self._running():
            (grad,) = torch.autograd.grad(self._at(at), at, create_graph=True, materialize_grads=True)
            parts = [torch.autograd.grad(grad, at, v, retain_graph=True, materialize_grads=True)[0] for v in vectors]
        return torch.stack(parts)

    def drawn(self) -> Tensor:
        """U of a draw from the prior, (D,); N(0, 1) where that is flat."""
        with torch.no_grad(), self._running(), poutine.block():
            trace = poutine.trace(DrawableFlats(spread=True)(self.program.model)).get_trace(*self.args)
            return torch.cat([place.inverse(trace.nodes[place.name]["value"]) for place in self._places])

    def noise(self, count: int) -> Tensor:
        """N(0, 1) numbers, (count, D)."""
        with self._running():
            return torch.randn(count, self.size)

    def prototype(self) -> Tensor:
        """U where the guide's own start is, (D,)."""
        nodes = self.program.guide.prototype_trace.nodes  # type: ignore[attr-defined]
        return torch.cat([place.inverse(nodes[place.name]["value"]) for place in self._places])

    def named(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained value by site, in the shape that a guide has for it."""
        pieces = u.split([place.size for place in self._places])
        return {p.name: piece.view(p.shape) for p, piece in zip(self._places, pieces, strict=True)}

    def constrained(self, u: Tensor) -> dict[str, Tensor]:
        """Value by site in the model's own space."""
        named = self.named(u)
        return {place.name: place.transform(named[place.name]) for place in self._places}

    def _at(self, u: Tensor) -> Tensor:
        guard = nullcontext() if self._all_double else InDouble()
        with guard as doubled:
            named = self.named(u)
            values = {place.name: place.transform(named[place.name]) for place in self._places}
            trace = poutine.trace(poutine.condition(self.program.model, data=values)).get_trace(*self.args)
            total = log_density(trace)
            if self.jacobian:
                changes = [p.transform.log_abs_det_jacobian(named[p.name], values[p.name]).sum() for p in self._places]
                total = total + torch.stack(changes).sum()
        self._all_double = doubled is None or not doubled.met
        return total

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self.program.running(self._flat, self.stream):
            yield


@dataclass(frozen=True)
class _Place:
    name: str
    transform: Any
    shape: torch.Size

    @property
    def size(self) -> int:
        return self.shape.numel()

    @classmethod
    def of(cls, name: str, site: dict[str, Any]) -> _Place:
        transform = biject_to(site["fn"].support)
        return cls(name, transform, transform.inv(site["value"]).shape)

    def inverse(self, value: Tensor) -> Tensor:
        flat: Tensor = self.transform.inv(value.detach().double()).reshape(-1)
        return flat


def _rows(grad: Tensor, at: Tensor) -> Tensor:
    if not grad.requires_grad:
        return torch.zeros(len(at), len(at), dtype=at.dtype, device=at.device)
    eye = torch.eye(len(at), dtype=at.dtype, device=at.device)
    try:
        rows: Tensor = torch.autograd.grad(
            grad, at, eye, is_grads_batched=True, retain_graph=True, materialize_grads=True
        )[0]
    except RuntimeError:  # an operation that torch.vmap doesn't know
        rows = torch.stack([torch.autograd.grad(g, at, retain_graph=True, materialize_grads=True)[0] for g in grad])
    return rows


def _finite(value: Tensor) -> float:
    number = value.item()
    return number if math.isfinite(number) else -math.inf


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
