"""What of a guide is identified: where its draws lie and how wide, whatever its parameters do for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.model.bound_model import BoundModel
from inference.optim.initialization.laplace import InitialNormal
from inference.utils.random_state import RandomStream

__all__ = ["PathMoments"]

_DRAWS = 500


@dataclass(frozen=True)
class PathMoments:
    """Means and log standard deviations of a guide's draws, from the same base draws at every θ.

    ``start`` gives the unit: v = L⁻¹(u − μ₀), in which the posterior's sds are
    about 1. Of u too, the log sds.
    """

    bound_model: BoundModel
    start: InitialNormal

    def __call__(self, points: Tensor) -> Tensor:
        """(T, 3D) in double precision, of θ at T points, (T, P)."""
        return torch.stack([self._of(theta) for theta in points])

    @torch.no_grad()
    def _of(self, theta: Tensor) -> Tensor:
        start = self.start
        guide: Any = self.bound_model.guide
        with self.bound_model.running(theta, RandomStream.seeded(0)):
            draws = guide.get_posterior().sample((_DRAWS,)).double() - start.loc
        white = draws / start.sd if start.scale_tril is None else torch.linalg.solve(start.scale_tril, draws.T).T
        return torch.cat([white.mean(0), white.std(0).log(), draws.std(0).log()])
