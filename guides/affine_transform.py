"""A correlated place for what a flow's layers give: location, scales and a unit lower triangle."""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform

__all__ = ["LowerTriangularAffine"]


class LowerTriangularAffine(Transform):
    """Y → μ + σ ⊙ Uy, with a unit lower triangular U: with y ~ N(0, I) every Normal is such a z.

    μ and σ are (D,), U is (D, D). The product is a sum of D × D numbers, which
    runs for many draws at once as elementwise code does.

    >>> loc, scale, unit = torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    >>> LowerTriangularAffine(loc, scale, unit)(torch.ones(2))
    tensor([1., 3.])
    """

    bijective = True
    domain = codomain = constraints.real_vector

    def __init__(self, loc: Tensor, scale: Tensor, unit: Tensor) -> None:
        super().__init__(cache_size=1)
        self._parts = (loc, scale, unit)

    def detached(self) -> LowerTriangularAffine:
        """Return this map, cut off from the gradient of μ, σ and U."""
        return LowerTriangularAffine(*(part.detach() for part in self._parts))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ log σ, the shape of x without its last dimension."""
        return self._parts[1].log().sum(-1).expand(x.shape[:-1])

    def _call(self, x: Tensor) -> Tensor:
        loc, scale, unit = self._parts
        return loc + scale * (unit * x.unsqueeze(-2)).sum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        loc, scale, unit = self._parts
        centred = ((y - loc) / scale).unsqueeze(-1)
        return torch.linalg.solve_triangular(unit, centred, upper=False, unitriangular=True).squeeze(-1)
