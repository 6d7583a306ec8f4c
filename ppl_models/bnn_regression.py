"""The Bayesian neural network of Edward's tutorial, with noise that can be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_models.noise import Noise, noise_scale
from ppl_models.scaling import Scaling

__all__ = ["bnn_regression", "suggested_options"]


def bnn_regression(
    x: Tensor,
    y: Tensor | None = None,
    *,
    hidden: Sequence[int] = (10, 10),
    weight_prior: str = "unit",
    noise: Noise = 0.1,
    scaling: Scaling | Mapping[str, Any] | None = None,
) -> Tensor:
    """Y ~ N(f(x; w), σ), f a tanh network, every weight and bias N(0, 1) or N(0, 1/fan-in).

    Sites ``w0, b0, w1, b1, …`` hold the weights (inputs × outputs) and biases.

    Parameters
    ----------
    x, y
        (N, D) and (N,).
    hidden
        Sizes of the hidden layers.
    weight_prior
        Variance of each weight: ``"unit"`` is 1, as in the tutorial; ``"fan-in"``
        is 1/inputs of its layer, so that f stays of order one in wide networks.
        Biases have variance 1.
    noise
        σ in the units of y (0.1 in the tutorial), ``"learned"`` as the site
        ``noise`` ~ HalfNormal(y_scale), or ``"heteroscedastic"``: softplus of the
        network's second output.
    scaling
        Standardisation of x and y, see :class:`~ppl_models.scaling.Scaling`.

    Returns
    -------
    Tensor
        The observations, (N,).

    References
    ----------
    Tran et al. (2016), Edward: A library for probabilistic modeling, inference, and criticism.
    Neal (1995), Bayesian learning for neural networks.
    """
    units = Scaling.read(scaling)
    columns = units.inputs(x)
    varying = noise == "heteroscedastic"
    layers = _draw_layers([columns.shape[1], *hidden, 2 if varying else 1], weight_prior, columns)
    sigma = None if varying else noise_scale(noise, units.y_scale, columns)
    with pyro.plate("data", len(columns)):
        rows = pyro.subsample(columns, event_dim=1)
        observed = pyro.subsample(y, event_dim=0) if y is not None else None
        outputs = _network(rows, layers)
        if sigma is None:
            sigma = units.y_scale * torch.nn.functional.softplus(outputs[:, 1]) + 1e-6
        return pyro.sample("y", dist.Normal(units.target(outputs[:, 0]), sigma), obs=observed)


def _draw_layers(sizes: Sequence[int], weight_prior: str, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    if weight_prior not in ("unit", "fan-in"):
        raise ValueError(f"weight_prior is {weight_prior!r}: pass 'unit' or 'fan-in'")
    layers = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        scale = 1.0 if weight_prior == "unit" else inputs**-0.5
        weights = pyro.sample(f"w{i}", dist.Normal(like.new_zeros(inputs, outputs), scale).to_event(2))
        bias = pyro.sample(f"b{i}", dist.Normal(like.new_zeros(outputs), 1.0).to_event(1))
        layers.append((weights, bias))
    return layers


def _network(rows: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    for weights, bias in layers[:-1]:
        rows = torch.tanh(rows @ weights + bias)
    weights, bias = layers[-1]
    return rows @ weights + bias


def suggested_options(x: Any, y: Any) -> dict[str, Any]:
    """What the command line binds: learned noise, the fan-in prior, and the scales of the training rows.

    One hidden layer with a unit for every ten rows an input, between 5 and 50:
    a mean-field guide pays for each weight that the data leave open.
    """
    rows, inputs = np.asarray(x).reshape(len(x), -1).shape
    return {
        "hidden": [int(np.clip(rows // (10 * inputs), 5, 50))],
        "noise": "learned",
        "weight_prior": "fan-in",
        "scaling": Scaling.of(x, y).as_dict(),
    }
