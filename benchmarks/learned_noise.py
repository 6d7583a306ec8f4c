"""Edward's network with learned noise: guides that collapse, one that does not, and Pyro's NUTS beside them.

    python -m benchmarks.learned_noise --threads 1 --nuts

40 rows of a cosine with noise of sd 0.05, weights N(0, 1). Each way and seed by Adam along half a cosine from
0.01, 10,000 steps of one draw; NUTS with 500 steps of warm-up and 500 draws. Of each: the mean of the noise,
RMSE of the mean of the functions to the true curve on 200 points of [−1, 1], the share of the curve in the
90 % interval of the functions and of new observations, gradients of the log density, seconds of the processor
(a first fit compiles), the ELBO, and the verdict. ``--data 1`` draws other noise for the rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from examples.bayesian_nn import GRID
from guides import conditional_normal, full_rank_normal, low_rank_normal, mean_field_normal
from inference import cosine_decay, fit
from ppl_models import bnn_regression
from ppl_models.data.datasets import cosine
from ppl_models.data.tables import Table

MODEL = partial(bnn_regression, noise="learned")
DRAWS, STEPS, LR, WARMUP = 1000, 10_000, 0.01, 500
Builder = Callable[[Any], Any]
WAYS: dict[str, Builder] = {
    "mean field": mean_field_normal,
    "low rank": low_rank_normal,
    "full rank": full_rank_normal,
    "last layer given the rest": partial(conditional_normal, linear=["w2", "b2"]),
}


def scores(functions: np.ndarray, noise: np.ndarray) -> str:
    """Noise, RMSE and both coverages of S functions on the grid, (S, 200), and as many noise scales."""
    truth = np.cos(np.pi * GRID[:, 0])
    new = functions + noise[:, None] * np.random.default_rng(0).normal(size=functions.shape)
    rmse = np.sqrt(np.mean((functions.mean(0) - truth) ** 2))
    inside = []
    for draws in (functions, new):
        lower, upper = np.quantile(draws, [0.05, 0.95], 0)
        inside.append(float(np.mean((lower <= truth) & (truth <= upper))))
    return f"{noise.mean():>7.3f}{rmse:>8.4f}{inside[0]:>8.2f}{inside[1]:>7.2f}"


def by_kiln(builder: Builder, data: Table, seed: int) -> str:
    """Scores, cost and verdict of one fit."""
    began = time.process_time()
    schedule = cosine_decay(LR, STEPS)
    posterior = fit(MODEL, builder(MODEL), data.x, data.y, steps=STEPS, lr=schedule, seed=seed, progress=False)
    seconds = time.process_time() - began
    functions = posterior.predict(GRID, draws=DRAWS).draws
    noise = posterior.sample(DRAWS)["noise"]
    found = posterior.diagnose()
    cost = f"{posterior.record.evaluations:>9,}{seconds:>8.1f}{-posterior.losses[-500:].mean():>8.1f}"
    return f"{scores(np.asarray(functions), np.asarray(noise))}{cost}   {found.verdict}, k-hat {found.khat:.1f}"


def by_nuts(data: Table, seed: int) -> str:
    """Scores and cost of one chain of Pyro's NUTS on the traced model."""
    args = tuple(torch.as_tensor(np.asarray(value), dtype=torch.float32) for value in (data.x, data.y))
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began, asked = time.process_time(), 0
    start, potential, transforms, _ = initialize_model(MODEL, args, jit_compile=True, skip_jit_warnings=True)

    def counted(values: dict[str, Tensor]) -> Tensor:
        nonlocal asked
        asked += 1
        return potential(values)

    kernel = NUTS(potential_fn=counted)
    chain = MCMC(kernel, DRAWS // 2, WARMUP, initial_params=start, transforms=transforms, disable_progbar=True)
    chain.run()
    seconds = time.process_time() - began
    draws = chain.get_samples()
    rows = torch.as_tensor(GRID, dtype=torch.float32)
    functions = torch.stack([_function({k: v[i] for k, v in draws.items()}, rows) for i in range(DRAWS // 2)])
    return f"{scores(functions.numpy(), draws['noise'].numpy())}{asked:>9,}{seconds:>8.1f}"


def _function(latents: dict[str, Tensor], rows: Tensor) -> Tensor:
    with torch.no_grad():
        nodes = pyro.poutine.trace(pyro.poutine.condition(MODEL, data=latents)).get_trace(rows).nodes
    mean: Tensor = nodes["y"]["fn"].mean
    return mean


def main() -> None:
    """Print a line for each way and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=int, default=0, help="the seed of the noise in the rows")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--nuts", action="store_true", help="Pyro's NUTS too: minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = cosine(seed=options.data)
    print(f"{'way':<27}seed  noise    RMSE   curve  obs.    grads seconds    ELBO   verdict")
    for way in options.ways:
        for seed in range(options.seeds):
            print(f"{way:<27}{seed:>4}{by_kiln(WAYS[way], data, seed)}", flush=True)
    if options.nuts:
        print(f"{'NUTS':<27}{0:>4}{by_nuts(data, 0)}", flush=True)


if __name__ == "__main__":
    main()
