"""The log joint of a model over its unconstrained latents, with its derivatives, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from inference.model.bound_model import BoundModel
from inference.model.elbo import log_density
from inference.model.improper_priors import DrawableFlats
from inference.utils.random_state import RandomStream

__all__ = ["InDouble", "LatentLayout", "LogJoint"]


@dataclass(frozen=True)
class LatentLayout:
    """The latents of an autoguide, once it has run: names, shapes in u, and h: u → z to each one's support."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    transforms: tuple[Any, ...]

    @classmethod
    def of(cls, guide: Callable[..., Any]) -> LatentLayout:
        """Those of ``guide``; none if it is no autoguide."""
        nodes = dict(guide.prototype_trace.iter_stochastic_nodes()) if isinstance(guide, AutoGuide) else {}
        transforms = tuple(biject_to(site["fn"].support) for site in nodes.values())
        found = zip(transforms, nodes.values(), strict=True)
        return cls(tuple(nodes), tuple(h.inv(site["value"]).shape for h, site in found), transforms)

    @property
    def size(self) -> int:
        """D, the numbers in u."""
        return sum(shape.numel() for shape in self.shapes)

    def named(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained value by site, of u, (D,)."""
        pieces = u.split([shape.numel() for shape in self.shapes])
        return {n: piece.view(shape) for n, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Z by site in the model's own space, and log |dz/du| in nats."""
        values, changes = {}, []
        for (name, part), h in zip(self.named(u).items(), self.transforms, strict=True):
            values[name] = h(part)
            changes.append(h.log_abs_det_jacobian(part, values[name]).sum())
        return values, torch.stack(changes).sum()

    def joined(self, trace: poutine.Trace) -> Tensor:
        """U, (D,), in double precision, of the values in a trace."""
        pairs = zip(self.names, self.transforms, strict=True)
        return torch.cat([h.inv(trace.nodes[name]["value"].detach().double()).reshape(-1) for name, h in pairs])


_SINGLE, _DOUBLE = torch.float32, torch.float64
_OPERATORS = ("__matmul__", "__rmatmul__")


class InDouble(TorchFunctionMode):
    """Single-precision constants of model and guide join an operation with double ones as double.

    ``met`` says whether there were any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        found = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        name = getattr(func, "__name__", "")
        if _SINGLE not in found or _DOUBLE not in found or (name.endswith("_") and name not in _OPERATORS):
            return func(*args, **kwargs)
        self.met = True
        args, kwargs = tree_map(_doubled, (args, kwargs))
        return func(*args, **kwargs)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == _SINGLE else value


_NoFactor = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@dataclass
class LogJoint:
    """log p(x, z(u)) + log |dz/du| as a function of u, (D,), where an autoguide draws, in nats.

    Scales, masks and factors count as in the ELBO; parameters of the model are
    held where the program starts. Without ``jacobian`` the second term is left
    out. ``evaluations`` counts what was asked: one for a value or a gradient, D
    for a Hessian, which is as many Hessian-vector products.
    """

    bound_model: BoundModel
    args: tuple[Any, ...]
    stream: RandomStream
    jacobian: bool = True
    evaluations: int = 0
    places: LatentLayout = field(init=False)
    _flat: Tensor = field(init=False)
    _all_double: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.bound_model = replace(self.bound_model, dtype=torch.float64)
        self.args = tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in self.args)
        self._flat = self.bound_model.params.flatten().double()
        self.places = LatentLayout.of(self.bound_model.guide)

    @property
    def size(self) -> int:
        """D, the numbers in u."""
        return self.places.size

    def value(self, u: Tensor) -> float:
        """The log joint, −∞ where it is not a number, or needs a factor of a matrix that has none."""
        self.evaluations += 1
        with torch.no_grad(), self._running(), suppress(_NoFactor):
            return _finite(self._at(u))
        return -math.inf

    def slope(self, u: Tensor) -> tuple[float, Tensor]:
        """The log joint and its gradient, (D,); NaN where a matrix has no factor."""
        self.evaluations += 1
        at = u.detach().requires_grad_()
        with torch.enable_grad(), self._running(), suppress(_NoFactor):
            value = self._at(at)
            (grad,) = torch.autograd.grad(value, at, materialize_grads=True)
            return _finite(value.detach()), grad
        return -math.inf, torch.full_like(u, math.nan)

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
        with torch.no_grad(), self._running(), InDouble(), poutine.block():
            trace = poutine.trace(DrawableFlats(spread=True)(self.bound_model.model)).get_trace(*self.args)
            return self.places.joined(trace)

    def noise(self, count: int) -> Tensor:
        """N(0, 1) numbers, (count, D)."""
        with self._running():
            return torch.randn(count, self.size)

    def prototype(self) -> Tensor:
        """U where the guide's own start is, (D,)."""
        return self.places.joined(self.bound_model.guide.prototype_trace)  # type: ignore[attr-defined]

    def _at(self, u: Tensor) -> Tensor:
        guard = nullcontext() if self._all_double else InDouble()
        with guard as doubled:
            values, change = self.places.values(u)
            trace = poutine.trace(poutine.condition(self.bound_model.model, data=values)).get_trace(*self.args)
            total = log_density(trace) + change if self.jacobian else log_density(trace)
        self._all_double = doubled is None or not doubled.met
        return total

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self.bound_model.running(self._flat, self.stream):
            yield


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
