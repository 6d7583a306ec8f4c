"""Coordinates in which the posterior is round: the optimiser moves φ, and θ = θ₀ + Wφ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from torch import Tensor
from torch.distributions import transform_to

from inference.places import Places
from inference.program import Program
from inference.start import Start

__all__ = ["Whitening", "whitening"]

_DENSE = 25  # latents whose factor has a map of its own; above, only the locations have one
_LAYERS = 0.1  # of a flow's layers, many of which move a draw together


@dataclass(frozen=True)
class Whitening:
    """W = diag(``scale``), with the square ``block`` in its place at the entries ``rows``.

    ``scale`` is (P,), ``rows`` (m,) and ``block`` (m, m).
    """

    scale: Tensor
    rows: Tensor
    block: Tensor

    def move(self, phi: Tensor) -> Tensor:
        """Wφ, (P,)."""
        if len(self.rows) == len(self.scale):
            return self.block @ phi
        return (self.scale * phi).index_copy(0, self.rows, self.block @ phi[self.rows])

    def coordinates(self, change: Tensor) -> Tensor:
        """Φ of changes of θ, both (T, P), in double precision."""
        found = change / self.scale.double()
        if len(self.rows):
            found[:, self.rows] = torch.linalg.solve(self.block.double(), change[:, self.rows].T).T
        return found

    def pull(self, grad: Tensor) -> Tensor:
        """Wᵀg, (P,): the gradient by φ."""
        if len(self.rows) == len(self.scale):
            return self.block.T @ grad
        return (self.scale * grad).index_copy(0, self.rows, self.block.T @ grad[self.rows])


def whitening(program: Program, start: Start, theta: Tensor) -> Whitening:
    """The map of a guide placed at ``theta`` by :func:`~inference.placing.apply_start`.

    A location moves by Lφ, L the Cholesky factor of the start's covariance; an
    independent spread by σφ/√2, a full-rank factor by LΦ with Φ/√2 on its
    diagonal, both to first order: at a Normal posterior the Hessian of −ELBO in
    φ is the identity. A flow's layers move by a tenth of φ, other parameters by φ.
    """
    return _Layout(program, start, theta).whitening()


class _Layout:
    """Where in θ the guide's parameters are, and the map of each."""

    def __init__(self, program: Program, start: Start, theta: Tensor) -> None:
        self.guide = program.guide
        self.params = program.params
        self.start = start
        self.theta = theta
        self.scale = torch.ones_like(theta)
        self.blocks: list[tuple[list[int], Tensor]] = []
        self.prefix = getattr(program.guide, "_pyro_name", "")

    def whitening(self) -> Whitening:
        guide, tril = self.guide, self.start.scale_tril
        square = self.start.sd.diag() if tril is None else tril
        if isinstance(guide, AutoNormal):
            sites = Places.of(guide).names
            self._block([i for name in sites for i in self._entries(f"locs.{name}")], square)
            for name in sites:
                self._spread(f"scales.{name}")
        elif isinstance(guide, AutoContinuous):
            self._block(self._entries("loc"), square)
            for name in self._own():
                if name.startswith("transform"):
                    self.scale[self._entries(name)] = _LAYERS
            if "scale_tril" in self._own() and tril is not None and len(tril) <= _DENSE:
                self._factor(tril)
            elif "scale" in self._own():
                self._spread("scale")
        rows = torch.tensor([i for part, _ in self.blocks for i in part], dtype=torch.long)
        block = torch.block_diag(*(matrix for _, matrix in self.blocks)) if self.blocks else torch.zeros(0, 0)
        return Whitening(self.scale, rows, block.to(self.theta))

    def _own(self) -> set[str]:
        return {name.removeprefix(f"{self.prefix}.") for name in self.params.names}

    def _entries(self, name: str) -> list[int]:
        which = self.params.names.index(f"{self.prefix}.{name}")
        begin = sum(leaf.numel() for leaf in self.params.leaves[:which])
        return list(range(begin, begin + self.params.leaves[which].numel()))

    def _block(self, entries: list[int], matrix: Tensor) -> None:
        self.blocks.append((entries, matrix))

    def _slopes(self, name: str) -> Tensor:
        """How fast each unconstrained number moves with the constrained one."""
        which = self.params.names.index(f"{self.prefix}.{name}")
        at = self.theta[self._entries(name)].double().requires_grad_(True)
        (slope,) = torch.autograd.grad(transform_to(self.params.constraints[which])(at).sum(), at)
        return 1 / slope

    def _spread(self, name: str) -> None:
        sigma = self.params.constrained(self.theta, [f"{self.prefix}.{name}"])[f"{self.prefix}.{name}"]
        self.scale[self._entries(name)] = (self._slopes(name) * sigma.reshape(-1).double() / math.sqrt(2)).to(
            self.theta
        )

    def _factor(self, tril: Tensor) -> None:
        """A ``scale`` s and a unit ``scale_tril`` U with diag(s)U = L(1 + Φ), moved together by Φ."""
        size = len(tril)
        s, moves = tril.diagonal(), []
        unit = tril / s[:, None]
        slopes = self._slopes("scale")
        for i in range(size):
            for j in range(size):
                if j > i:  # above the diagonal nothing is
                    continue
                change = torch.outer(tril[:, i], torch.eye(size, dtype=tril.dtype)[j]).tril()
                change = change / math.sqrt(2) if i == j else change
                ds = change.diagonal()
                du = (change - unit * ds[:, None]) / s[:, None]
                place = i if i == j else size + i * size + j
                moves.append((place, torch.cat([slopes * ds, du.tril(-1).reshape(-1)])))
        matrix = torch.eye(size + size**2, dtype=tril.dtype)  # 1 for what is above the diagonal, and never moves
        for place, column in moves:
            matrix[:, place] = column
        self._block([*self._entries("scale"), *self._entries("scale_tril")], matrix)
