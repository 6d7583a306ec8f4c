"""Regression networks: weights and biases as sites, layers with an activation, and a Normal likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_models.noise_scale import Noise, noise_scale
from ppl_models.scaling import Scaling

__all__ = ["network_regression"]


def network_regression(
    x: Tensor,
    y: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    hidden: Sequence[int],
    weight_prior: str,
    noise: Noise,
    scaling: Scaling | Mapping[str, Any] | None,
) -> Tensor:
    """Y ~ N(f(x; w), σ), f a network with ``activation`` between its layers; the sites of :func:`bnn_regression`."""
    units = Scaling.read(scaling)
    columns = units.inputs(x)
    varying = noise == "heteroscedastic"
    layers = _draw_layers([columns.shape[1], *hidden, 2 if varying else 1], weight_prior, columns)
    sigma = None if varying else noise_scale(noise, units.y_scale, columns)
    with pyro.plate("data", len(columns)):
        rows = pyro.subsample(columns, event_dim=1)
        observed = pyro.subsample(y, event_dim=0) if y is not None else None
        outputs = _network(rows, layers, activation)
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


def _network(rows: Tensor, layers: list[tuple[Tensor, Tensor]], activation: Callable[[Tensor], Tensor]) -> Tensor:
    for weights, bias in layers[:-1]:
        rows = activation(rows @ weights + bias)
    weights, bias = layers[-1]
    return rows @ weights + bias
