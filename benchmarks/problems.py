"""The five works that the engines are timed on, as a Pyro user writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import iterated, planar
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import Tensor, nn

from guides import mean_field_normal
from ppl_models import bnn_regression
from ppl_models.data.datasets import cosine

__all__ = [
    "LAYERS",
    "PARTICLES",
    "SCHOOLS",
    "SMALL",
    "WORKS",
    "Encoder",
    "Network",
    "Work",
    "binary_images",
    "decoder",
    "digits",
]

SCHOOLS = np.array([[28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]], dtype=np.float32)
LAYERS, PARTICLES = 16, 1000
SMALL = 1e-3  # the step size for networks


@dataclass(frozen=True)
class Work:
    """A model, a guide and data: what one step is timed on, with Adam at ``lr``."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Tensor, ...]
    particles: int = 1
    lr: float = 0.01

    def to(self, device: str) -> Work:
        """Return the work with its data on a device; networks follow when they are first used."""
        for part in (self.model, self.guide):
            for cell in getattr(part, "__closure__", None) or ():
                if isinstance(cell.cell_contents, nn.Module):
                    cell.cell_contents.to(device)
        return replace(self, args=tuple(value.to(device) for value in self.args))


def edward() -> Work:
    """Edward's network: 40 rows, 141 latents, AutoNormal."""
    data = cosine()
    args = (torch.tensor(data.x, dtype=torch.float32), torch.tensor(data.y, dtype=torch.float32))
    return Work(bnn_regression, mean_field_normal(bnn_regression), args)


def eight_schools() -> Work:
    """Rubin's eight schools, centred: 10 latents, AutoNormal."""

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return Work(model, mean_field_normal(model), tuple(torch.tensor(SCHOOLS)))


def planar_flow() -> Work:
    """Energy U1 of Rezende, Mohamed (2015), 16 planar layers, 1,000 particles in two dimensions."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1).mask(False))
        ring = 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2
        modes = torch.exp(-0.5 * ((z[..., 0] - 2) / 0.6) ** 2) + torch.exp(-0.5 * ((z[..., 0] + 2) / 0.6) ** 2)
        pyro.factor("energy", -ring + torch.log(modes + 1e-9))

    torch.manual_seed(0)
    return Work(model, AutoNormalizingFlow(model, partial(iterated, LAYERS, planar)), (), PARTICLES)


class Encoder(nn.Module):
    """784-500-500-(50, 50)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(784, 500), nn.ELU(), nn.Linear(500, 500), nn.ELU())
        self.head = nn.Linear(500, 100)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z|x)."""
        mean, log_variance = self.head(self.body(x)).chunk(2, -1)
        return mean, torch.exp(0.5 * log_variance)


def decoder() -> nn.Sequential:
    """50-500-500-784."""
    return nn.Sequential(nn.Linear(50, 500), nn.ELU(), nn.Linear(500, 500), nn.ELU(), nn.Linear(500, 784))


def vae() -> Work:
    """The VAE of the NNabla tutorial on a batch of 128 binary images."""
    torch.manual_seed(0)
    encode, decode = Encoder(), decoder()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 50), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encode)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encode(x)).to_event(1))

    return Work(model, guide, (torch.tensor(binary_images(128)),), lr=SMALL)


class Network(nn.Sequential):
    """The Chainer tutorial's CNN: two convolutions with pooling, two layers of 1,000 with dropout, ten classes."""

    def __init__(self) -> None:
        pool = partial(nn.MaxPool2d, 2, ceil_mode=True)
        super().__init__(
            *(nn.Conv2d(1, 16, 3), nn.ReLU(), pool(), nn.Conv2d(16, 32, 3), nn.ReLU(), pool(), nn.Flatten()),
            *(nn.Linear(1152, 1000), nn.ReLU(), nn.Dropout(), nn.Linear(1000, 1000), nn.ReLU(), nn.Dropout()),
            nn.Linear(1000, 10),
        )


def dropout_cnn() -> Work:
    """MC dropout by a network with nn.Dropout under pyro.module, on a batch of 100 digits."""
    torch.manual_seed(0)
    network = Network()

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=network(x)), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        """Guide without latent sites: only the dropout in the network is random."""

    x, y = digits(100)
    return Work(model, guide, (torch.tensor(x), torch.tensor(y)), lr=SMALL)


def binary_images(rows: int) -> np.ndarray:
    """Rows of 784 pixels, 0 or 1, two in ten of them 1; speed does not depend on what they show."""
    return (np.random.default_rng(0).random((rows, 784)) < 0.2).astype(np.float32)


def digits(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 28 by 28 with classes; speed does not depend on what they show."""
    generator = np.random.default_rng(0)
    return generator.random((rows, 1, 28, 28)).astype(np.float32), generator.integers(0, 10, rows)


WORKS: dict[str, Callable[[], Work]] = {
    "Edward's network": edward,
    "eight schools": eight_schools,
    "planar flow": planar_flow,
    "VAE": vae,
    "dropout CNN": dropout_cnn,
}
