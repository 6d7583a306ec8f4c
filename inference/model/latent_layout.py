"""Where in one unconstrained vector each latent lies, as Pyro's autoguides lay them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["LatentLayout"]


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
