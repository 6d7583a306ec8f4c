"""Run the model at given latents: predictive moments, samples and log likelihoods."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical
from torch import Tensor

from inference.model.elbo import Model
from inference.model.sites import base_distribution
from inference.model.vectorization import draws_together, map_over_draws
from inference.predictive.prediction import ClassPrediction, LatentValues, Prediction

__all__ = ["at_latents", "concatenate", "log_likelihood", "predictive"]


def _model_at(model: Model, latents: LatentValues) -> Model:
    """The model with its latents set and its observations drawn."""
    return poutine.condition(poutine.uncondition(model), data=dict(latents))


def at_latents(
    model: Model, latents: LatentValues, args: tuple[Any, ...], site: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the model says of ``site`` at one z: mean and variance, or class probabilities alone; and a sample."""
    nodes = poutine.trace(_model_at(model, latents)).get_trace(*args).nodes
    if site not in nodes:
        raise ValueError(f"the model has no site {site!r} when run on the new data: it must not depend on y")
    return _describe(nodes[site]["fn"]), nodes[site]["value"]


def predictive(
    model: Model, latents: LatentValues, draws: int, args: tuple[Any, ...], site: str, at_once: int | None = None
) -> Prediction | ClassPrediction:
    """Run the model at S draws of the latents, ``{site: (S, *site shape)}``, and collect what it says of ``site``.

    ``at_once`` is how many draws to run together, if it is known.
    """

    def run(z: LatentValues) -> tuple[tuple[Tensor, ...], Tensor]:
        return at_latents(model, z, args, site)

    described, samples = map_over_draws(run, latents, draws, at_once or draws_together(args))
    if len(described) == 1:
        return ClassPrediction(site, described[0], samples)
    means, variances = described
    if torch.isfinite(means).all():
        return Prediction(site, means, samples, variances.mean(0))
    # No finite mean, as under a Cauchy: the draws themselves are all there is.
    return Prediction(site, samples, samples, torch.zeros_like(samples[0]))


def concatenate(parts: list[Prediction | ClassPrediction]) -> Prediction | ClassPrediction:
    """The predictions of one batch of rows after the other, as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    draws, samples = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("draws", "samples"))
    if isinstance(first, ClassPrediction):
        return ClassPrediction(first.site, draws, samples)
    return Prediction(
        first.site, draws, samples, torch.cat([part.noise for part in parts if isinstance(part, Prediction)])
    )


def _describe(fn: Any) -> tuple[Tensor, ...]:
    """Class probabilities alone where the site is a class, else mean and variance."""
    base = base_distribution(fn)
    if isinstance(base, Categorical):
        found: tuple[Tensor, ...] = (base.probs,)
    elif isinstance(base, Bernoulli) and len(fn.shape()) == 1:
        found = (torch.stack([1 - base.probs, base.probs], -1),)
    else:
        found = tuple(moment.expand(fn.shape()) for moment in _moments(fn))
    return found


def _moments(fn: Any) -> tuple[Tensor, Tensor]:
    while type(fn).__name__ == "MaskedDistribution":
        fn = fn.base_dist
    try:
        return fn.mean, fn.variance
    except NotImplementedError:
        draws = fn.sample((256,))
        return draws.mean(0), draws.var(0)


def log_likelihood(
    model: Model, latents: LatentValues, draws: int, args: tuple[Any, ...], sites: list[str]
) -> dict[str, Tensor]:
    """log p(yₙ | zₛ) at each observed site, shape (S, N, …), without plate scales."""

    def run(z: LatentValues) -> dict[str, Tensor]:
        nodes = poutine.trace(poutine.condition(model, data=dict(z))).get_trace(*args).nodes
        drawn = [site for site in sites if not nodes[site]["is_observed"]]
        if drawn:
            raise ValueError(f"it draws {drawn} rather than observe them: give their data too, in the order of the fit")
        return {site: nodes[site]["fn"].log_prob(nodes[site]["value"]) for site in sites}

    found: dict[str, Tensor] = map_over_draws(run, latents, draws, draws_together(args))
    return found
