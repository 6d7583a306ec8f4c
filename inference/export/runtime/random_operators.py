"""Torch's random operators in NumPy, by the names that they have below autograd, with a generator in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["RANDOM"]

Array = Any


def _shape(x: Any) -> Any:
    """The shape, where that is all that a random operator is given of a tensor."""
    return tuple(x) if isinstance(x, list) else x.shape


def _normal(g: Any, mean: Any, std: Any) -> Array:
    return mean + std * g.standard_normal(np.broadcast_shapes(np.shape(mean), np.shape(std)))


def _dirichlet(g: Any, alpha: Array) -> Array:
    parts = g.standard_gamma(alpha)
    return parts / parts.sum(-1, keepdims=True)


def _multinomial(g: Any, probs: Array, count: int, replacement: bool = False) -> Array:
    if count > 1 and not replacement:
        raise ValueError("draws without replacement")
    steps = np.cumsum(probs, -1)[..., None, :]
    places = g.random((*probs.shape[:-1], count, 1)) * steps[..., -1:]
    return np.minimum((places >= steps).sum(-1), probs.shape[-1] - 1)


RANDOM: dict[str, Callable[..., Any]] = {
    "normal": _normal, "normal_": lambda g, x, mean=0, std=1: mean + std * g.standard_normal(_shape(x)),
    "randn": lambda g, size, *_: g.standard_normal(tuple(size)), "rand": lambda g, size, *_: g.random(tuple(size)),
    "randn_like": lambda g, x, *_: g.standard_normal(_shape(x)), "rand_like": lambda g, x, *_: g.random(_shape(x)),
    "uniform_": lambda g, x, low=0, high=1: g.uniform(low, high, _shape(x)),
    "exponential_": lambda g, x, rate=1: g.exponential(1 / rate, _shape(x)),
    "cauchy_": lambda g, x, median=0, sigma=1: median + sigma * g.standard_cauchy(_shape(x)),
    "geometric_": lambda g, x, p: g.geometric(p, _shape(x)),
    "log_normal_": lambda g, x, mean=1, std=2: np.exp(mean + std * g.standard_normal(_shape(x))),
    "bernoulli": lambda g, p: g.random(p.shape) < p, "bernoulli_": lambda g, x, p=0.5: g.random(_shape(x)) < p,
    "poisson": lambda g, rate: g.poisson(rate), "binomial": lambda g, n, p: g.binomial(n.astype(np.int64), p),
    "_standard_gamma": lambda g, alpha: g.standard_gamma(alpha), "_sample_dirichlet": _dirichlet,
    "multinomial": _multinomial,
}  # fmt: skip
