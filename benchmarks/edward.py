"""Edward's network by Kiln and by NumPyro: how close the predictive mean comes to the cosine.

    pip install -c constraints.txt -e ".[bench]"
    python -m benchmarks.edward

The same 40 rows, model, mean-field guide, Adam with half a cosine from 0.01, and number of steps;
RMSE of the predictive mean to cos on 200 points of [−1, 1], for three seeds.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_median
from numpyro.optim import Adam

from examples.bayesian_nn import DRAWS, GRID, LR, run
from ppl_models.data.datasets import cosine


def network(x: jax.Array, y: jax.Array | None = None) -> None:
    """The tutorial's model in NumPyro."""
    sizes = [1, 10, 10, 1]
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        weights = numpyro.sample(f"w{i}", dist.Normal(jnp.zeros((inputs, outputs)), 1.0).to_event(2))
        bias = numpyro.sample(f"b{i}", dist.Normal(jnp.zeros(outputs), 1.0).to_event(1))
        x = x @ weights + bias
        x = jnp.tanh(x) if i < len(sizes) - 2 else x
    mean = numpyro.deterministic("mean", x[:, 0])
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(mean, 0.1), obs=y)


def numpyro_rmse(seed: int, steps: int, draws: int) -> float:
    """Fit by NumPyro's AutoNormal and compare with the curve."""
    data = cosine()

    def schedule(step: jax.Array) -> jax.Array:
        return 0.5 * LR * (1 + jnp.cos(jnp.pi * step / steps))

    guide = AutoNormal(network, init_loc_fn=init_to_median)
    svi = SVI(network, guide, Adam(schedule), Trace_ELBO())
    result = svi.run(jax.random.PRNGKey(seed), steps, jnp.array(data.x), jnp.array(data.y), progress_bar=False)
    predictive = Predictive(network, guide=guide, params=result.params, num_samples=draws, return_sites=["mean"])
    means = predictive(jax.random.PRNGKey(seed + 100), jnp.array(GRID))["mean"]
    return float(np.sqrt(np.mean((np.asarray(means).mean(0) - np.cos(np.pi * GRID[:, 0])) ** 2)))


def main() -> None:
    """Print both, seed by seed, and the ratio of their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    ours = [run(0.1, seed, options.steps).rmse for seed in range(options.seeds)]
    theirs = [numpyro_rmse(seed, options.steps, DRAWS) for seed in range(options.seeds)]
    for seed, pair in enumerate(zip(ours, theirs, strict=True)):
        print(f"seed {seed}: Kiln {pair[0]:.4f}, NumPyro {pair[1]:.4f}")
    print(f"mean: Kiln / NumPyro = {statistics.mean(ours) / statistics.mean(theirs):.3f}")


if __name__ == "__main__":
    main()
