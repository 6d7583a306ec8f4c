"""A variational autoencoder: images from a few latent numbers each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

__all__ = ["VAE", "decoder", "encoder"]


class VAE(nn.Module):
    """Z ~ N(0, I), x ~ p(x | f(z)), for each row its own z; a Pyro model ``(x)`` with the site ``z``, (N, K).

    Fit it with :func:`~guides.amortized_encoder` and an :func:`encoder`. The
    start of the weights is torch's, so ``torch.manual_seed`` fixes it.

    Parameters
    ----------
    decoder
        A network f from (B, K) to (B, D), such as :func:`decoder`; it is not copied.
    latent
        K.
    noise
        σ of x ~ N(f(z), σ²), for grey values; None if x is 0 or 1, and f its logits.

    References
    ----------
    Kingma, Welling (2014), Auto-encoding variational Bayes.

    Examples
    --------
    >>> import torch
    >>> from guides import amortized_encoder
    >>> from inference import fit
    >>> x = (torch.rand(60, 16) < 0.3).float()
    >>> model = VAE(decoder(16, latent=2, hidden=[8]), latent=2)
    >>> guide = amortized_encoder(model, encoder(16, latent=2, hidden=[8]))
    >>> posterior = fit(model, guide, x, steps=20, batch_size=20, progress=False)
    >>> posterior.sample(3)["z"].shape
    torch.Size([3, 60, 2])
    >>> posterior.predict(x[:5], draws=10).mean.shape          # reconstructions
    torch.Size([5, 16])
    """

    def __init__(self, decoder: nn.Module, *, latent: int = 50, noise: float | None = None) -> None:
        super().__init__()
        if noise is not None and (isinstance(noise, bool) or not noise > 0):
            raise ValueError(f"noise is {noise!r}: pass a number above 0, or None if x is 0 or 1")
        self.decoder = decoder
        self.latent = latent
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        """The observations, (N, D)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            rows = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(rows), self.latent), 1.0).to_event(1))
            out = self.decoder(z)
            likelihood = dist.Bernoulli(logits=out) if self.noise is None else dist.Normal(out, self.noise)
            return pyro.sample("x", likelihood.to_event(1), obs=rows)


def encoder(pixels: int = 784, *, latent: int = 50, hidden: Sequence[int] = (500, 500)) -> nn.Sequential:
    """784-500-500-(50, 50) with ELU: the encoder of the NNabla tutorial, means first, then log variances."""
    return _layers([pixels, *hidden, 2 * latent])


def decoder(pixels: int = 784, *, latent: int = 50, hidden: Sequence[int] = (500, 500)) -> nn.Sequential:
    """50-500-500-784 with ELU: the decoder of the NNabla tutorial."""
    return _layers([latent, *reversed(hidden), pixels])


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ELU()]
    return nn.Sequential(*layers[:-1])
