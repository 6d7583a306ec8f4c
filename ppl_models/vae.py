"""A variational autoencoder: images from a few latent numbers each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isqrt, prod
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
from torch import Tensor, nn

__all__ = ["VAE", "decoder_network", "encoder_network"]


class VAE(nn.Module):
    """Z ~ N(0, I), x ~ p(x | f(z)), for each row its own z; a Pyro model ``(x)`` with the site ``z``, (N, K).

    Fit it with :func:`~guides.amortized_encoder`, with an encoder of mirrored
    sizes or your own. The start of the weights is torch's, so
    ``torch.manual_seed`` fixes it.

    Parameters
    ----------
    pixels
        D, the numbers of a row.
    latent
        K.
    hidden
        Units of the encoder's layers, from x to z; the decoder has them the other way round.
    noise
        σ of x ~ N(f(z), σ²), for grey values; None if x is 0 or 1, and f its logits.
    decoder
        A network f of your own from (B, K) to (B, D), which is not copied; one of :func:`decoder_network` if left out.
    image_shape
        (H, W), if rows are images, for figures.

    References
    ----------
    Kingma, Welling (2014), Auto-encoding variational Bayes.

    Examples
    --------
    >>> import torch
    >>> import kiln
    >>> from kiln.guides import amortized_encoder
    >>> x = (torch.rand(60, 16) < 0.3).float()
    >>> model = VAE(16, latent=2, hidden=[8])
    >>> posterior = kiln.fit(model, amortized_encoder(model), x, steps=20, batch_size=20, progress=False)
    >>> posterior.encode(x[:5]).mean.shape
    torch.Size([5, 2])
    >>> posterior.reconstruct(x[:5]).shape
    torch.Size([5, 16])
    """

    usual_guide = "amortized_encoder"
    usual_fit: ClassVar[dict[str, Any]] = {"lr": 1e-3, "batch_size": 128}

    def __init__(
        self,
        pixels: int = 784,
        *,
        latent: int = 50,
        hidden: Sequence[int] = (500, 500),
        noise: float | None = None,
        decoder: nn.Module | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if noise is not None and (isinstance(noise, bool) or not noise > 0):
            raise ValueError(f"noise is {noise!r}: pass a number above 0, or None if x is 0 or 1")
        if image_shape is not None and prod(image_shape) != pixels:
            raise ValueError(f"image_shape {tuple(image_shape)} has not the {pixels} pixels of a row")
        self.pixels, self.latent, self.hidden = pixels, latent, tuple(hidden)
        self.noise = noise
        self.decoder = decoder_network(pixels, latent=latent, hidden=hidden) if decoder is None else decoder
        self.image_shape = None if image_shape is None else tuple(image_shape)

    @staticmethod
    def suggested_options(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        """For rows x, (N, D): their width, square images where D is a square, and noise where x is not 0 or 1."""
        pixels = x.shape[1]
        side = isqrt(pixels)
        square = {"image_shape": [side, side]} if side * side == pixels and side >= 8 else {}
        bits = bool(np.isin(x, (0, 1)).all())
        return {"pixels": pixels, **square, **({} if bits else {"noise": 0.5 * float(x.std())})}

    def encoder(self) -> nn.Sequential:
        """A new encoder, of the decoder's sizes mirrored, where the decoder's weights are and of their type."""
        return encoder_network(self.pixels, latent=self.latent, hidden=self.hidden).to(next(self.decoder.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        """The observations, (N, D)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            rows = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(rows), self.latent), 1.0).to_event(1))
            out = self.decoder(z)
            likelihood = dist.Bernoulli(logits=out) if self.noise is None else dist.Normal(out, self.noise)
            return pyro.sample("x", likelihood.to_event(1), obs=rows)


def encoder_network(pixels: int = 784, *, latent: int = 50, hidden: Sequence[int] = (500, 500)) -> nn.Sequential:
    """784-500-500-(50, 50) with ELU: the encoder of the NNabla tutorial, means first, then log variances."""
    return _layers([pixels, *hidden, 2 * latent])


def decoder_network(pixels: int = 784, *, latent: int = 50, hidden: Sequence[int] = (500, 500)) -> nn.Sequential:
    """50-500-500-784 with ELU: the decoder of the NNabla tutorial."""
    return _layers([latent, *reversed(hidden), pixels])


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ELU()]
    return nn.Sequential(*layers[:-1])
