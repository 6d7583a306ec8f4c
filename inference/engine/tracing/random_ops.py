"""Random numbers of a step, taken out of the model: recorded once, drawn many steps at a time.

A random call has a fixed cost, however few numbers it draws, and cannot be
fused with other operators. If its distribution is the same at every
step, the call need not be in the graph: :class:`RandomOp` describes it,
:meth:`RandomOp.many` draws the numbers of many steps with one call, and the
graph reads one row a step. :class:`ReplayRandomOps` runs the model itself on
the same numbers, to compare the two or to explain a failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from inference.engine.tracing.traced_graph import DispatchMode

__all__ = ["CountRandomOps", "RandomOp", "ReplayRandomOps", "is_random", "pack"]

aten = torch.ops.aten
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_SIZED = (aten.rand.default, aten.randn.default)
_ELEMENTWISE = (
    aten.bernoulli.default,
    aten.normal.Tensor_Tensor,
    aten.poisson.default,
    aten._sample_dirichlet.default,
    aten._standard_gamma.default,
    aten.rand_like.default,
    aten.randn_like.default,
)


def is_random(func: Any) -> bool:
    """Return True if the operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


@dataclass(frozen=True)
class RandomOp:
    """One random call in a model or guide whose distribution is the same at every step.

    ``func(*args, **kwargs)`` is the operator as torch ran it; ``shape`` and
    ``dtype`` are those of its result. In-place operators have no first argument.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def in_place(self) -> bool:
        """True if the operator fills the tensor that it is given, as ``normal_`` does."""
        return bool(self.func._schema.is_mutable)

    @property
    def size(self) -> int:
        """Number of values that one step needs."""
        return int(torch.Size(self.shape).numel())

    @property
    def kind(self) -> tuple[Any, ...]:
        """Key that draws share if one call can fill them together.

        With a tensor among the arguments the numbers have different distributions, so each such draw is alone.
        """
        if self.in_place and not any(isinstance(a, Tensor) for a in self.args):
            return (self.func, self.args, tuple(self.kwargs.items()), self.dtype)
        return (id(self),)

    def many(self, count: int) -> Tensor:
        """Return the results of ``count`` independent calls, stacked along a new first dimension.

        There is one branch for each way in which an operator can be told to draw more: a larger tensor to fill, a
        method of its own, a size as its first argument, or parameters that are repeated. Any other is called
        ``count`` times.
        """
        if self.in_place:
            empty = torch.empty(count, *self.shape, dtype=self.dtype, device=self.device)
            return torch.as_tensor(self.func(empty, *self.args, **self.kwargs))
        if hasattr(self.func, "many"):
            return torch.as_tensor(self.func.many(count, *self.args, **self.kwargs))
        if self.func is aten.bernoulli.default and self.args[0].device.type == "cpu" and self.dtype in _NUMPY:
            return coins(self.args[0], count)
        if self.func in _SIZED:
            return torch.as_tensor(self.func([count, *self.args[0]], *self.args[1:], **self.kwargs))
        if self.func in _ELEMENTWISE:
            many = [a.expand(count, *a.shape) if isinstance(a, Tensor) else a for a in self.args]
            return torch.as_tensor(self.func(*many, **self.kwargs))
        return torch.stack([self.func(*self.args, **self.kwargs) for _ in range(count)])


def coins(probs: Tensor, count: int) -> Tensor:
    """``count`` draws of Bernoulli(p), (count, *shape), in a sixth of the time that torch takes; seeded by torch.

    A draw is 1 if 8 random bits are below p · 2⁸, and where they are equal to its
    whole part with the rest of p as the probability.

    >>> _ = torch.manual_seed(0)
    >>> coins(torch.tensor([0.0, 0.25, 1.0]), 100_000).mean(0)
    tensor([0.0000, 0.2501, 1.0000])
    """
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, (), device="cpu"))))
    scaled = np.ldexp(probs.detach().double().numpy(), 8)
    shape = (count, *scaled.shape)
    size = math.prod(shape)
    bits = generator.integers(0, 2**64, -(-size // 8), dtype=np.uint64).view(np.uint8)[:size].reshape(shape)
    whole = np.minimum(scaled, 2**8 - 1).astype(np.uint8)
    rest = scaled - whole
    if scaled.size and (scaled == scaled.flat[0]).all():
        whole, rest = whole.flat[0], rest.reshape(-1)[:1]
    heads = bits < whole
    ties = np.flatnonzero(bits == whole)
    heads.reshape(-1)[ties] = generator.random(len(ties)) < rest.reshape(-1)[ties % max(rest.size, 1)]
    return torch.from_numpy(heads.astype(_NUMPY[probs.dtype]))


def pack(draws: Sequence[RandomOp]) -> list[list[int]]:
    """Return the positions of the draws that one call can fill together, in the order of their first."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, draw in enumerate(draws):
        groups.setdefault(draw.kind, []).append(i)
    return list(groups.values())


class ReplayRandomOps(DispatchMode):
    """Answer each recorded random call with the number given, in order; the others run as they are.

    ``values`` holds a tensor for each recorded call and None for each that the
    compiled program drew itself.
    """

    def __init__(self, values: Iterable[Tensor | None]) -> None:
        super().__init__()
        self.values = iter(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, or hand back what was drawn before."""
        kwargs = kwargs or {}
        value = next(self.values) if is_random(func) else None
        if value is None:
            return func(*args, **kwargs)
        return args[0].copy_(value) if func._schema.is_mutable else value


class CountRandomOps(DispatchMode):
    """Count the random ``numbers`` that are drawn inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        out = func(*args, **(kwargs or {}))
        if is_random(func):
            self.numbers += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out
