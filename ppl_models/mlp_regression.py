"""The regression network of Chainer's tutorial: leaky ReLU between its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import leaky_relu

from ppl_models.bnn_regression import suggested_options
from ppl_models.network import network_regression
from ppl_models.noise_scale import Noise
from ppl_models.scaling import Scaling

__all__ = ["mlp_regression", "suggested_options"]

SLOPE = 0.2  # of the activation below zero, as in the tutorial


def mlp_regression(
    x: Tensor,
    y: Tensor | None = None,
    *,
    hidden: Sequence[int] = (16, 32),
    weight_prior: str = "fan-in",
    noise: Noise = 0.02,
    scaling: Scaling | Mapping[str, Any] | None = None,
) -> Tensor:
    """Y ~ N(f(x; w), σ), f a network of leaky ReLUs with slope 0.2, every weight N(0, 1/fan-in) or N(0, 1).

    Sites ``w0, b0, w1, b1, …`` and all options are those of
    :func:`~ppl_models.bnn_regression`. With Pyro's AutoDelta the fit is
    least squares with weight decay; a guide with a spread makes it Bayesian.

    Examples
    --------
    >>> import torch
    >>> from pyro.infer.autoguide import AutoDelta, init_to_sample
    >>> import kiln
    >>> x = torch.linspace(0, 1, 100).reshape(-1, 1)
    >>> model = partial(mlp_regression, noise=0.001, scaling=Scaling.of(x, x[:, 0].exp()))
    >>> guide = AutoDelta(model, init_loc_fn=init_to_sample)
    >>> posterior = kiln.fit(model, guide, x, x[:, 0].exp(), steps=900, progress=False)
    >>> posterior.params["AutoDelta.w1"].shape
    torch.Size([16, 32])
    >>> bool(abs(posterior.predict(torch.tensor([[0.2]]), draws=1).mean - 1.2214) < 0.05)
    True
    """
    return network_regression(x, y, partial(leaky_relu, negative_slope=SLOPE), hidden, weight_prior, noise, scaling)
