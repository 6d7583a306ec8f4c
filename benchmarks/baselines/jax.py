"""The works of :mod:`benchmarks.problems` in JAX: NumPyro where its documentation has a way, else by hand.

Each returns ``run(steps)``, one compiled ``lax.scan`` over that many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam

from benchmarks.edward import network
from benchmarks.problems import LAYERS, PARTICLES, SCHOOLS, SMALL, binary_images, digits
from ppl_models.data.datasets import cosine

__all__ = ["RIVALS"]

Steps = Callable[[int], object]


def scanned(step: Callable[[Any], tuple[Any, jax.Array]], state: Any) -> Steps:
    """``run(steps)`` that carries the state on."""
    held = [state]

    @partial(jax.jit, static_argnums=1)
    def many(start: Any, steps: int) -> tuple[Any, jax.Array]:
        return lax.scan(lambda carry, _: step(carry), start, None, length=steps)

    def run(steps: int) -> np.ndarray:
        held[0], losses = many(held[0], steps)
        return np.asarray(losses)

    return run


def by_numpyro(model: Callable[..., Any], guide: Any, args: tuple[Any, ...], lr: float = 0.01) -> Steps:
    """NumPyro's SVI with Adam, its update inside ``lax.scan``."""
    svi = SVI(model, guide, Adam(lr), Trace_ELBO())
    return scanned(lambda state: svi.update(state, *args), svi.init(random.PRNGKey(0), *args))


def edward() -> Steps:
    """Edward's network by AutoNormal."""
    data = cosine()
    return by_numpyro(network, AutoNormal(network), (jnp.array(data.x), jnp.array(data.y)))


def eight_schools() -> Steps:
    """Rubin's eight schools by AutoNormal."""

    def model(y: jax.Array, sigma: jax.Array) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", len(y)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return by_numpyro(model, AutoNormal(model), tuple(jnp.array(SCHOOLS)))


def dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """Weights as torch starts them."""
    bound = inputs**-0.5
    weight = random.uniform(key, (inputs, outputs), minval=-bound, maxval=bound)
    return {"weight": weight, "bias": jnp.zeros(outputs)}


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """X w + b."""
    return x @ layer["weight"] + layer["bias"]


def stack(sizes: list[int], seed: int) -> list[dict[str, jax.Array]]:
    """Layers of the given sizes."""
    keys = random.split(random.PRNGKey(seed), len(sizes) - 1)
    return [dense(key, *pair) for key, pair in zip(keys, pairwise(sizes), strict=True)]


def elu_network(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Affine layers with ELU between."""
    for layer in layers[:-1]:
        x = jax.nn.elu(affine(layer, x))
    return affine(layers[-1], x)


def vae() -> Steps:
    """The VAE in NumPyro, its networks as parameters."""

    def model(x: jax.Array) -> None:
        layers = numpyro.param("decoder", stack([50, 500, 500, 784], 1))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(50), 1).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=elu_network(layers, z)).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        layers = numpyro.param("encoder", stack([784, 500, 500, 100], 0))
        mean, log_variance = jnp.split(elu_network(layers, x), 2, axis=-1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(mean, jnp.exp(0.5 * log_variance)).to_event(1))

    return by_numpyro(model, guide, (jnp.array(binary_images(128)),), SMALL)


def by_hand(loss: Callable[[Any, jax.Array], jax.Array], params: Any, lr: float = 0.01) -> Steps:
    """Adam on ``loss(params, key)``."""
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(carry: Any) -> tuple[Any, jax.Array]:
        params, first, second, count, key = carry
        key, now = random.split(key)
        value, grad = jax.value_and_grad(loss)(params, now)
        count = count + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grad)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grad)
        scale = lr * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        params = jax.tree.map(lambda p, m, v: p - scale * m / (jnp.sqrt(v) + 1e-8), params, first, second)
        return (params, first, second, count, key), value

    return scanned(step, (params, zeros, zeros, jnp.zeros(()), random.PRNGKey(0)))


def planar_flow() -> Steps:
    """Sixteen planar layers on energy U1, by hand, the layers unrolled."""
    bound = 2**-0.5
    u, w = (random.uniform(random.PRNGKey(i), (LAYERS, 2), minval=-bound, maxval=bound) for i in (0, 1))
    params = {"u": u, "w": w, "b": jnp.zeros(LAYERS)}

    def loss(params: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        z = random.normal(key, (PARTICLES, 2))
        log_q = -0.5 * (z**2).sum(-1) - jnp.log(2 * jnp.pi)
        for k in range(LAYERS):
            u, w, b = params["u"][k], params["w"][k], params["b"][k]
            inner = w @ u
            u = u + (jax.nn.softplus(inner) - 1 - inner) * w / (w @ w)
            act = jnp.tanh(z @ w + b)
            log_q = log_q - jnp.log(jnp.abs(1 + (1 - act**2) * (w @ u)))
            z = z + u * act[:, None]
        ring = 0.5 * ((jnp.linalg.norm(z, axis=-1) - 2) / 0.4) ** 2
        modes = jnp.exp(-0.5 * ((z[:, 0] - 2) / 0.6) ** 2) + jnp.exp(-0.5 * ((z[:, 0] + 2) / 0.6) ** 2)
        return jnp.mean(log_q + ring - jnp.log(modes + 1e-9))

    return by_hand(loss, params)


def dropout_cnn() -> Steps:
    """The Chainer tutorial's CNN, by hand."""
    images, classes = digits(100)
    x, y = jnp.array(images), jnp.array(classes)
    keys = random.split(random.PRNGKey(0), 5)
    params = {
        "first": random.normal(keys[0], (16, 1, 3, 3)) / 3,
        "second": random.normal(keys[1], (32, 16, 3, 3)) / 12,
        "biases": [jnp.zeros((16, 1, 1)), jnp.zeros((32, 1, 1))],
        "dense": [dense(keys[2], 1152, 1000), dense(keys[3], 1000, 1000), dense(keys[4], 1000, 10)],
    }

    def pool(h: jax.Array) -> jax.Array:
        size = [(0, 0), (0, 0), (0, h.shape[2] % 2), (0, h.shape[3] % 2)]
        return lax.reduce_window(h, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), size)

    def convolved(h: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return pool(jax.nn.relu(lax.conv(h, kernel, (1, 1), "VALID") + bias))

    def dropped(h: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(random.bernoulli(key, 0.5, h.shape), h / 0.5, 0)

    def loss(params: dict[str, Any], key: jax.Array) -> jax.Array:
        first, second = random.split(key)
        h = convolved(x, params["first"], params["biases"][0])
        h = convolved(h, params["second"], params["biases"][1]).reshape(len(x), -1)
        h = dropped(jax.nn.relu(affine(params["dense"][0], h)), first)
        h = dropped(jax.nn.relu(affine(params["dense"][1], h)), second)
        logits = jax.nn.log_softmax(affine(params["dense"][2], h))
        return -jnp.take_along_axis(logits, y[:, None], 1).sum()

    return by_hand(loss, params, SMALL)


RIVALS: dict[str, tuple[str, Callable[[], Steps]]] = {
    "Edward's network": ("NumPyro", edward),
    "eight schools": ("NumPyro", eight_schools),
    "planar flow": ("JAX by hand", planar_flow),
    "VAE": ("NumPyro", vae),
    "dropout CNN": ("JAX by hand", dropout_cnn),
}
