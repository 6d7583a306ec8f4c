"""The works of :mod:`benchmarks.problems` in torch by hand: one flat loss function, autograd, fused Adam.

Each work is its parameters and a function that returns −ELBO of a fresh draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from benchmarks.problems import (
    LAYERS,
    PARTICLES,
    SCHOOLS,
    SMALL,
    Encoder,
    Network,
    binary_images,
    decoder,
    digits,
)
from ppl_models.data.datasets import cosine

__all__ = ["BY_HAND", "by_hand"]

Steps = Callable[[int], object]
Problem = tuple[list[Tensor], Callable[[], Tensor], float]


def by_hand(problem: Callable[[], Problem], compiled: bool) -> Steps:
    """The loop that torch's tutorials write, with or without torch.compile on the loss."""
    params, loss, lr = problem()
    optimizer = torch.optim.Adam(params, lr=lr, fused=True)
    evaluate = torch.compile(loss) if compiled else loss

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            evaluate().backward()
            optimizer.step()

    return run


def normal_log(x: Tensor, mean: Tensor | float, scale: Tensor | float) -> Tensor:
    """Log density of N(mean, scale²)."""
    scale = torch.as_tensor(scale)
    return -0.5 * ((x - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def mean_field(size: int) -> tuple[list[Tensor], Callable[[], tuple[Tensor, Tensor]]]:
    """Location and scale of a Normal guide, and a draw with its log q."""
    loc = torch.zeros(size, requires_grad=True)
    raw = torch.full((size,), -2.25, requires_grad=True)

    def draw() -> tuple[Tensor, Tensor]:
        scale = softplus(raw)
        z = loc + scale * torch.randn(size)
        return z, normal_log(z, loc, scale).sum()

    return [loc, raw], draw


def edward() -> Problem:
    """Edward's network."""
    data = cosine()
    x, y = (torch.tensor(v, dtype=torch.float32) for v in (data.x, data.y))
    params, draw = mean_field(141)

    def loss() -> Tensor:
        z, log_q = draw()
        h, at = x, 0
        for i, (inputs, outputs) in enumerate(pairwise([1, 10, 10, 1])):
            weights = z[at : at + inputs * outputs].view(inputs, outputs)
            bias = z[at + inputs * outputs : at + inputs * outputs + outputs]
            at += inputs * outputs + outputs
            h = h @ weights + bias
            h = torch.tanh(h) if i < 2 else h
        return log_q - normal_log(z, 0.0, 1.0).sum() - normal_log(y, h[:, 0], 0.1).sum()

    return params, loss, 0.01


def eight_schools() -> Problem:
    """Rubin's eight schools."""
    y, sigma = torch.tensor(SCHOOLS)
    params, draw = mean_field(10)

    def loss() -> Tensor:
        z, log_q = draw()
        mu, log_tau, theta = z[0], z[1], z[2:]
        tau = log_tau.exp()
        log_p = normal_log(mu, 0.0, 5.0) + math.log(2 / (5 * math.pi)) - torch.log1p((tau / 5) ** 2) + log_tau
        return log_q - log_p - normal_log(theta, mu, tau).sum() - normal_log(y, theta, sigma).sum()

    return params, loss, 0.01


def planar_flow() -> Problem:
    """Sixteen planar layers on energy U1."""
    torch.manual_seed(0)
    u, w = ((2 * torch.rand(LAYERS, 2) - 1).mul(2**-0.5).requires_grad_(True) for _ in range(2))
    b = torch.zeros(LAYERS, requires_grad=True)

    def loss() -> Tensor:
        z = torch.randn(PARTICLES, 2)
        log_q = normal_log(z, 0.0, 1.0).sum(-1)
        for k in range(LAYERS):
            inner = w[k] @ u[k]
            direction = u[k] + (softplus(inner) - 1 - inner) * w[k] / (w[k] @ w[k])
            act = torch.tanh(z @ w[k] + b[k])
            log_q = log_q - torch.log(torch.abs(1 + (1 - act**2) * (w[k] @ direction)))
            z = z + direction * act[:, None]
        ring = 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2
        modes = torch.exp(-0.5 * ((z[:, 0] - 2) / 0.6) ** 2) + torch.exp(-0.5 * ((z[:, 0] + 2) / 0.6) ** 2)
        return (log_q + ring - torch.log(modes + 1e-9)).mean()

    return [u, w, b], loss, 0.01


def vae() -> Problem:
    """The VAE of the NNabla tutorial."""
    torch.manual_seed(0)
    encode, decode = Encoder(), decoder()
    x = torch.tensor(binary_images(128))

    def loss() -> Tensor:
        mean, scale = encode(x)
        z = mean + scale * torch.randn_like(scale)
        kl = (normal_log(z, mean, scale) - normal_log(z, 0.0, 1.0)).sum()
        return kl + binary_cross_entropy_with_logits(decode(z), x, reduction="sum")

    return [*encode.parameters(), *decode.parameters()], loss, SMALL


def dropout_cnn() -> Problem:
    """The Chainer tutorial's CNN."""
    torch.manual_seed(0)
    network: nn.Module = Network()
    x, y = (torch.tensor(v) for v in digits(100))
    return list(network.parameters()), lambda: cross_entropy(network(x), y, reduction="sum"), SMALL


BY_HAND: dict[str, Callable[[], Problem]] = {
    "Edward's network": edward,
    "eight schools": eight_schools,
    "planar flow": planar_flow,
    "VAE": vae,
    "dropout CNN": dropout_cnn,
}
