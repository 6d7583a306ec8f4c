"""Coordinates in which the posterior is round: the optimiser moves φ, and θ = θ₀ + Wφ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoNormal
from torch import Tensor
from torch.distributions import transform_to

from inference.model.bound_model import BoundModel
from inference.model.log_joint import LatentLayout
from inference.optim.initialization.initial_normal import InitialNormal
from inference.utils.random_state import RandomStream

__all__ = ["PathMoments", "Whitening", "whitening"]

_DRAWS = 500  # of a guide, for its moments
_LAYERS = 0.1  # of a flow's layers, many of which move a draw together


@dataclass(frozen=True)
class Triangle:
    """A ``scale`` s and a unit lower triangular U with diag(s)U = L(1 + Φ), moved together by Φ, to first order.

    ``spread`` and ``unit`` are the entries in θ of s, (D,), and of U, (D²,);
    ``slopes`` how fast the unconstrained s moves with s. Φ, lower triangular, has
    1/√2 on its diagonal for each unit of φ.
    """

    spread: Tensor
    unit: Tensor
    tril: Tensor
    slopes: Tensor

    @property
    def _weights(self) -> Tensor:
        """Φ for a unit of φ, (D, D)."""
        return torch.ones_like(self.tril).tril(-1) + torch.eye(len(self.tril)).to(self.tril) / math.sqrt(2)

    @property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """S and U at φ = 0."""
        s = self.tril.diagonal()
        return s, self.tril / s[:, None]

    def move(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """The change of what is at ``spread`` and ``unit``."""
        s, unit = self._rows
        size = len(s)
        matrix = self._weights * (phi[self.unit].view(size, size) + phi[self.spread].diag())
        change = self.tril @ matrix
        ds = change.diagonal()
        du = (change - unit * ds[:, None]) / s[:, None]
        return self.slopes * ds, du.tril(-1).reshape(-1)

    def pull(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient by φ at ``spread`` and ``unit``."""
        s, unit = self._rows
        size = len(s)
        below = grad[self.unit].view(size, size).tril(-1) / s[:, None]
        on = grad[self.spread] * self.slopes - (below * unit).sum(1)
        by = self._weights * (self.tril.T @ (below + on.diag()))
        return by.diagonal().clone(), by.tril(-1).reshape(-1)

    def coordinates(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Φ of changes of θ, (T, P), at ``spread``, (T, D), and ``unit``, (T, D²), in double precision."""
        s, unit = (part.double() for part in self._rows)
        size = len(s)
        ds = change[:, self.spread] / self.slopes.double()
        below = change[:, self.unit].view(-1, size, size).tril(-1) * s[:, None]
        whole = below + ds[:, :, None] * unit
        found = torch.linalg.solve_triangular(self.tril.double(), whole, upper=False)
        found = found / torch.where(self._weights > 0, self._weights, 1.0).double()
        return found.diagonal(dim1=1, dim2=2), found.tril(-1).reshape(len(change), -1)


@dataclass(frozen=True)
class Whitening:
    """W = diag(``scale``), with the square ``block`` in its place at the entries ``rows``, and a triangle at its own.

    ``scale`` is (P,), ``rows`` (m,) and ``block`` (m, m). ``moving`` is how many
    whitened coordinates there are; one that is not counts by the square of its scale.
    """

    scale: Tensor
    rows: Tensor
    block: Tensor
    moving: float
    triangle: Triangle | None = None

    def move(self, phi: Tensor) -> Tensor:
        """Wφ, (P,)."""
        moved = (self.scale * phi).index_copy(0, self.rows, self.block @ phi[self.rows])
        return moved if self.triangle is None else self._placed(moved, 0, *self.triangle.move(phi))

    def pull(self, grad: Tensor) -> Tensor:
        """Wᵀg, (P,): the gradient by φ."""
        pulled = (self.scale * grad).index_copy(0, self.rows, self.block.T @ grad[self.rows])
        return pulled if self.triangle is None else self._placed(pulled, 0, *self.triangle.pull(grad))

    def coordinates(self, change: Tensor) -> Tensor:
        """Φ of changes of θ, both (T, P), in double precision."""
        found = change / self.scale.double()
        found[:, self.rows] = torch.linalg.solve(self.block.double(), change[:, self.rows].T).T
        return found if self.triangle is None else self._placed(found, 1, *self.triangle.coordinates(change))

    def _placed(self, values: Tensor, dim: int, spread: Tensor, unit: Tensor) -> Tensor:
        triangle = self.triangle
        if triangle is None:
            return values
        return values.index_copy(dim, triangle.spread, spread).index_copy(dim, triangle.unit, unit)


def whitening(bound_model: BoundModel, start: InitialNormal, theta: Tensor) -> Whitening:
    """The map of a guide placed at ``theta`` by :func:`~inference.optim.initialization.initial_normal.place_guide`.

    A location moves by Lφ, L the Cholesky factor of the start's covariance; an
    independent spread by σφ/√2, a full-rank factor by LΦ with Φ/√2 on its
    diagonal, both to first order: at a Normal posterior the Hessian of −ELBO in
    φ is the identity. A flow's layers move by a tenth of φ, other parameters by φ.
    """
    return _Layout(bound_model, start, theta).whitening()


class _Layout:
    """Where in θ the guide's parameters are, and the map of each."""

    def __init__(self, bound_model: BoundModel, start: InitialNormal, theta: Tensor) -> None:
        self.guide = bound_model.guide
        self.params = bound_model.params
        self.start = start
        self.theta = theta
        self.scale = torch.ones_like(theta)
        self.rows: list[int] = []
        self.spreads: list[int] = []
        self.triangle: Triangle | None = None
        self.prefix = getattr(bound_model.guide, "_pyro_name", "")

    def whitening(self) -> Whitening:
        guide, tril = self.guide, self.start.scale_tril
        square = self.start.sd.diag() if tril is None else tril
        sites = LatentLayout.of(guide).names
        if isinstance(guide, AutoDelta):
            self.rows = [i for name in sites for i in self._entries(name)]
        elif isinstance(guide, AutoNormal):
            self.rows = [i for name in sites for i in self._entries(f"locs.{name}")]
            for name in sites:
                self._spread(f"scales.{name}")
        elif isinstance(guide, AutoContinuous):
            self.rows = self._entries("loc")
            for name in self._own():
                if name.startswith("transform"):
                    self.scale[self._entries(name)] = _LAYERS
            if "scale_tril" in self._own() and tril is not None:
                self.triangle = self._triangle(tril)
            elif "scale" in self._own():
                self._spread("scale")
        rows = torch.tensor(self.rows, dtype=torch.long, device=self.theta.device)
        counts = self.scale.double().square()
        counts[[*self.rows, *self.spreads]] = 1
        if self.triangle is not None:
            counts[self.triangle.spread] = 1
            counts[self.triangle.unit] = torch.ones_like(self.triangle.tril).tril(-1).reshape(-1).double()
        return Whitening(self.scale, rows, square.to(self.theta), float(counts.sum()), self.triangle)

    def _own(self) -> set[str]:
        return {name.removeprefix(f"{self.prefix}.") for name in self.params.names}

    def _entries(self, name: str) -> list[int]:
        which = self.params.names.index(f"{self.prefix}.{name}")
        begin = sum(leaf.numel() for leaf in self.params.leaves[:which])
        return list(range(begin, begin + self.params.leaves[which].numel()))

    def _slopes(self, name: str) -> Tensor:
        """How fast each unconstrained number moves with the constrained one."""
        which = self.params.names.index(f"{self.prefix}.{name}")
        at = self.theta[self._entries(name)].double().requires_grad_(True)
        (slope,) = torch.autograd.grad(transform_to(self.params.constraints[which])(at).sum(), at)
        return 1 / slope

    def _spread(self, name: str) -> None:
        sigma = self.params.constrained(self.theta, [f"{self.prefix}.{name}"])[f"{self.prefix}.{name}"]
        slopes = self._slopes(name) * sigma.reshape(-1).double() / math.sqrt(2)
        self.scale[self._entries(name)] = slopes.to(self.theta)
        self.spreads += self._entries(name)

    def _triangle(self, tril: Tensor) -> Triangle:
        where = self.theta.device
        spread, unit = (
            torch.tensor(self._entries(name), dtype=torch.long, device=where) for name in ("scale", "scale_tril")
        )
        return Triangle(spread, unit, tril.to(self.theta), self._slopes("scale").to(self.theta))


@dataclass(frozen=True)
class PathMoments:
    """Means and log standard deviations of a guide's draws, from the same base draws at every θ.

    ``start`` gives the unit: v = L⁻¹(u − μ₀), in which the posterior's sds are
    about 1. Of u too, the log sds.
    """

    bound_model: BoundModel
    start: InitialNormal

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """(T, 3D) in double precision, of θ at T points, (T, P)."""
        start, found = self.start, []
        guide: Any = self.bound_model.guide
        for theta in points:
            with self.bound_model.running(theta, RandomStream.seeded(0)):
                draws = guide.get_posterior().sample((_DRAWS,)).double() - start.loc
            white = draws / start.sd if start.scale_tril is None else torch.linalg.solve(start.scale_tril, draws.T).T
            found.append(torch.cat([white.mean(0), white.std(0).log(), draws.std(0).log()]))
        return torch.stack(found)
