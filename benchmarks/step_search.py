"""Steps that are found beside Adam's, tuned: fits of networks, encoders, dropout and mini-batches, which have no start.

    KILN_DATA=… python -m benchmarks.step_search --threads 1 --works edward vae

Each work and seed: ``fit(..., optimizer="auto")`` beside Adam at each of seven
step sizes, constant and with half a cosine to 0, all with the same number of
steps. Of each the ELBO on all rows after the fit, from draws of its own, with
their standard error. The best of Adam is the setting with the best mean over
the seeds, chosen after the fact.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guides import amortized_encoder, bernoulli_dropout, mean_field_normal
from inference import Posterior, cosine_decay, fit
from inference.model.bound_model import set_training
from inference.model.elbo import loss
from inference.model.subsampling import Subsampling
from inference.utils.random_state import RandomStream
from ppl_models import VAE, DropoutCNN, DropoutRegression, bnn_regression, linear_regression, mlp_regression
from ppl_models.data.datasets import cosine, mnist, mnist_bits, uci
from ppl_models.mlp_regression import suggested_options

SIZES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2)


@dataclass(frozen=True)
class Work:
    """A model with its guide on data, made anew for each seed.

    ``draws`` are those of the final ELBO, each on ``rows`` chosen at random, the
    same for every fit; None for all.
    """

    make: Callable[[], tuple[Any, Any, tuple[Tensor, ...]]]
    steps: int
    batch_size: int | None
    draws: int
    rows: int | None = None


def edward() -> tuple[Any, Any, tuple[Tensor, ...]]:
    """Edward's network on 40 points of a cosine, 141 latents."""
    data, model = cosine(), partial(bnn_regression, noise=0.1)
    return model, mean_field_normal(model), _tensors(data.x, data.y)


def vae(rows: int = 10_000, latent: int = 10, hidden: tuple[int, ...] = (100,)) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """An autoencoder of MNIST's bits."""
    model = VAE(latent=latent, hidden=hidden)
    return model, amortized_encoder(model), (torch.tensor(mnist_bits("train").x[:rows]),)


def cnn(rows: int = 2_000, hidden: int = 100) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """Chainer's network with dropout on some of MNIST."""
    data, model = mnist("train"), DropoutCNN(hidden=hidden)
    labels = torch.tensor(np.asarray(data.y)[:rows]).long()
    return model, bernoulli_dropout(model), (torch.tensor(data.x[:rows]), labels)


def dropout(scale: float = 1.0) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """Dropout regression of concrete's strength, on raw columns times ``scale``."""
    x, y = _tensors(*_columns("concrete"))
    model = DropoutRegression(x.shape[1], p=0.2, length_scale=1.0)
    return model, bernoulli_dropout(model), (scale * x, y)


def mlp() -> tuple[Any, Any, tuple[Tensor, ...]]:
    """The command line's network for yachts, a Normal weight by weight."""
    x, y = _columns("yacht")
    model = partial(mlp_regression, **suggested_options(x, y))
    return model, mean_field_normal(model), _tensors(x, y)


def line() -> tuple[Any, Any, tuple[Tensor, ...]]:
    """Linear regression, for its mini-batches."""
    x, y = _tensors(*_columns("concrete"))
    units = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return linear_regression, mean_field_normal(linear_regression), units


WORKS = {
    "edward": Work(edward, 10_000, None, 1_000),
    "edward, short": Work(edward, 2_000, None, 1_000),
    "vae": Work(vae, 1_000, 128, 5),
    "cnn": Work(cnn, 400, 200, 20),
    "line": Work(line, 2_000, 100, 200),
    "dropout": Work(dropout, 2_000, 100, 50),
    "dropout, columns × 100": Work(partial(dropout, 100.0), 2_000, 100, 50),
    "mlp": Work(mlp, 2_000, 100, 200),
    "vae, tutorial's": Work(partial(vae, 60_000, 50, (500, 500)), 4_690, 128, 2),
    "cnn, tutorial's": Work(partial(cnn, 60_000, 1_000), 1_800, 100, 100, rows=500),
}


def fitted(work: Work, seed: int, **options: Any) -> Posterior:
    """One fit, the weights of networks at the seed too."""
    torch.manual_seed(seed)
    model, guide, data = work.make()
    batch = work.batch_size
    return fit(
        model, guide, *data, steps=work.steps, batch_size=batch, seed=seed, engine="compiled", progress=False, **options
    )


def final_elbo(posterior: Posterior, draws: int, rows: int | None = None) -> tuple[float, float]:
    """The ELBO on all rows, as it was maximised, and its standard error, in nats."""
    bound_model = posterior.bound_model
    model, guide = bound_model.model, bound_model.guide
    if rows is not None:
        batch = Subsampling(len(posterior.data[0]), rows)
        model, guide = batch(model), batch(guide)
    theta = torch.cat([value.reshape(-1) for value in posterior.unconstrained_params.values()])
    set_training(bound_model.guide, True)
    with bound_model.running(theta, RandomStream.seeded(1)), torch.no_grad():
        found = [-float(loss(model, guide, posterior.data, 1, True)[0]) for _ in range(draws)]
    return mean(found), stdev(found) / math.sqrt(draws)


def _tensors(x: Any, y: Any) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(np.asarray(values)).float() for values in (x, y))


def _columns(name: str) -> tuple[np.ndarray, np.ndarray]:
    table = uci(name)
    return np.asarray(table.x), np.asarray(table.y)


def rules(steps: int, sizes: list[float]) -> dict[str, dict[str, Any]]:
    """Options of ``fit`` by name: steps that are found, then Adam's."""
    constant = {f"Adam {size:g}": {"optimizer": "adam", "lr": size} for size in sizes}
    cosines = {f"Adam {size:g} cosine": {"optimizer": "adam", "lr": cosine_decay(size, steps)} for size in sizes}
    return {"found": {"optimizer": "auto"}, **constant, **cosines}


def main() -> None:
    """Print a line a fit, and for each work the steps that were found beside the best of Adam."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.works:
        work, ways = WORKS[name], rules(WORKS[name].steps, options.sizes)
        elbos = [
            {rule: _elbo(work, name, rule, seed, how) for rule, how in ways.items()} for seed in range(options.seeds)
        ]
        means = {rule: mean(found[rule] for found in elbos) for rule in ways}
        found = means.pop("found")
        best = max(means, key=lambda rule: means[rule])
        print(f"{name}, mean of {options.seeds} seeds: found {found:.2f}, {best} {means[best]:.2f}", flush=True)


def _elbo(work: Work, name: str, rule: str, seed: int, how: dict[str, Any]) -> float:
    try:
        posterior = fitted(work, seed, **how)
    except ValueError as failure:
        print(f"{name:<24}{seed:>3}  {rule:<20} failed: {failure}", flush=True)
        return -math.inf
    elbo, error = final_elbo(posterior, work.draws, work.rows)
    steps = len(posterior.losses)
    print(f"{name:<24}{seed:>3}  {rule:<20}{elbo:>14.2f} ± {error:<8.2f}{steps:>7,} steps", flush=True)
    return elbo


if __name__ == "__main__":
    main()
