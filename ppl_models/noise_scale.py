"""The spread of observations round the regression line: fixed, learned, or a function of x."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Noise", "noise_scale"]

Noise = float | str


def noise_scale(noise: Noise, unit: float, like: Tensor) -> Tensor:
    """σ, in the units of y: the number ``noise``, or the latent site ``noise`` ~ HalfNormal(unit).

    Raises
    ------
    ValueError
        If ``noise`` is neither a number above 0 nor ``"learned"``.
    """
    if noise == "learned":
        return pyro.sample("noise", dist.HalfNormal(like.new_tensor(unit)))
    if isinstance(noise, bool | str) or not noise > 0:
        raise ValueError(f"noise is {noise!r}: pass a number above 0 or 'learned'")
    return torch.as_tensor(noise, dtype=like.dtype, device=like.device)
