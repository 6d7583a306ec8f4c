"""Energies on the plane: hard targets for a guide, with known normalisers.

U1 and U2 are also the two targets of the well-known TensorFlow tutorial on planar flows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.functional import relu

__all__ = ["ENERGIES", "Energy", "u1", "u2", "u3", "u4"]

WINDOW = 4.0  # U2 to U4 go on for ever along z1: beyond |z1| = 4 a wall rises
WALL = 0.4  # and falls off as a Normal of this standard deviation


class Energy(TorchDistribution):
    """P(z) = exp(−U(z)) / Z on the plane, for one of the energies U1 to U4.

    Z is found by quadrature, so log p is normalised: under a model that samples
    z from it, −ELBO is KL(q‖p) itself, in nats. U2, U3 and U4 are improper as
    published; here ½((|z₁| − 4)₊ / 0.4)² is added to them, a wall that leaves
    them as they are for |z₁| ≤ 4.

    Parameters
    ----------
    name
        ``"u1"``, ``"u2"``, ``"u3"`` or ``"u4"``.

    Raises
    ------
    ValueError
        If there is no energy of that name.

    References
    ----------
    Rezende, Mohamed (2015), Variational inference with normalizing flows, table 1.

    Examples
    --------
    >>> round(Energy("u1").log_normalizer, 6)
    1.877502
    >>> Energy("u2").log_prob(torch.zeros(5, 2)).shape, Energy("u2").sample((3,)).shape
    (torch.Size([5]), torch.Size([3, 2]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's name
    support = constraints.real_vector

    def __init__(self, name: str) -> None:
        if name not in ENERGIES:
            raise ValueError(f"there is no energy {name!r}: give one of {sorted(ENERGIES)}")
        self.name = name
        super().__init__(Size(), Size([2]), validate_args=False)

    @property
    def log_normalizer(self) -> float:
        """Log Z = log ∫ exp(−U(z)) dz."""
        return _quadrature(self.name)[0]

    def expand(self, batch_shape: Size, _instance: object = None) -> TorchDistribution:
        """A batch of the same."""
        return self if batch_shape == Size() else super().expand(batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """−U(z) − log Z, the shape of ``value`` without its last dimension."""
        return -ENERGIES[self.name](value) - self.log_normalizer

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 - torch's own default
        """Exact draws, by rejection from the uniform density on a box that holds all but 10⁻⁹ of the mass."""
        _, highest, box = _quadrature(self.name)
        wanted = Size(sample_shape).numel()
        found = torch.zeros(0, 2)
        while len(found) < wanted:
            points = (torch.rand(32 * wanted + 1024, 2) * 2 - 1) * box
            kept = torch.log1p(-torch.rand(len(points))) < self.log_prob(points) - highest
            found = torch.cat([found, points[kept]])
        return found[:wanted].reshape(*sample_shape, 2)


def u1() -> Tensor:
    """Z ~ exp(−U1): a ring of radius 2, thick at its left and right end: two modes."""
    return pyro.sample("z", Energy("u1"))


def u2() -> Tensor:
    """Z ~ exp(−U2): a band along a sine, for |z₁| ≤ 4."""
    return pyro.sample("z", Energy("u2"))


def u3() -> Tensor:
    """Z ~ exp(−U3): a sine that splits in two lower down around z₁ = 1, for |z₁| ≤ 4."""
    return pyro.sample("z", Energy("u3"))


def u4() -> Tensor:
    """Z ~ exp(−U4): a sine that a second one leaves at z₁ = 1, for |z₁| ≤ 4."""
    return pyro.sample("z", Energy("u4"))


def _energy_1(z: Tensor) -> Tensor:
    z1 = z[..., 0]
    ring = 0.5 * ((torch.linalg.vector_norm(z, dim=-1) - 2) / 0.4) ** 2
    return ring - torch.logaddexp(-0.5 * ((z1 - 2) / 0.6) ** 2, -0.5 * ((z1 + 2) / 0.6) ** 2)


def _energy_2(z: Tensor) -> Tensor:
    return 0.5 * (_above_sine(z) / 0.4) ** 2 + _wall(z)


def _energy_3(z: Tensor) -> Tensor:
    above = _above_sine(z)
    second = 3 * torch.exp(-0.5 * ((z[..., 0] - 1) / 0.6) ** 2)
    return -torch.logaddexp(-0.5 * (above / 0.35) ** 2, -0.5 * ((above + second) / 0.35) ** 2) + _wall(z)


def _energy_4(z: Tensor) -> Tensor:
    above = _above_sine(z)
    second = 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)
    return -torch.logaddexp(-0.5 * (above / 0.4) ** 2, -0.5 * ((above + second) / 0.35) ** 2) + _wall(z)


def _above_sine(z: Tensor) -> Tensor:
    return z[..., 1] - torch.sin(2 * math.pi * z[..., 0] / 4)


def _wall(z: Tensor) -> Tensor:
    return 0.5 * (relu(z[..., 0].abs() - WINDOW) / WALL) ** 2


ENERGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "u1": _energy_1,
    "u2": _energy_2,
    "u3": _energy_3,
    "u4": _energy_4,
}


@functools.cache
def _quadrature(name: str) -> tuple[float, float, float]:
    """Log Z, the highest log density, and the half width of the box: by the trapezoid rule with steps of 0.01."""
    box, step = 8.0, 0.01
    edge = torch.arange(-box, box + step / 2, step, dtype=torch.float64, device="cpu")
    log_density = -ENERGIES[name](torch.cartesian_prod(edge, edge))
    log_z = torch.logsumexp(log_density, 0).item() + 2 * math.log(step)
    return log_z, log_density.max().item() - log_z + 0.01, box
