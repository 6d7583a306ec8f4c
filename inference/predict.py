"""Predictions: one draw of the latents gives one function of all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical
from torch import Tensor

from inference.arguments import one_of, share
from inference.objective import Model
from inference.sites import base_distribution
from inference.vectorized import draws_together, for_each_draw

__all__ = [
    "ClassPrediction",
    "Interval",
    "Labelled",
    "Prediction",
    "Spread",
    "at_latents",
    "joined",
    "log_likelihood",
    "predictive",
    "quantile",
    "tails",
]

OF = ("observations", "functions")
Latents = Mapping[str, Tensor]


class Interval(NamedTuple):
    """Lower and upper ends, each of the prediction's row shape."""

    lower: Tensor
    upper: Tensor


class _Parts(Protocol):
    @property
    def epistemic(self) -> Tensor: ...

    @property
    def noise(self) -> Tensor: ...


class Spread:
    """How far observations are from their mean: what the functions leave open, and the noise."""

    @property
    def variance(self: _Parts) -> Tensor:
        """Var[y | x] = Var_z E[y | x, z] + E_z Var[y | x, z], shape (N, …)."""
        return self.epistemic + self.noise

    @property
    def std(self: _Parts) -> Tensor:
        """The square root of :attr:`variance`, in the units of y."""
        return (self.epistemic + self.noise).sqrt()


class _Classes(Protocol):
    @property
    def probs(self) -> Tensor: ...


class Labelled:
    """The class that probabilities are for."""

    @property
    def labels(self: _Classes) -> Tensor:
        """The most probable class, shape (N,)."""
        return self.probs.argmax(-1)


@dataclass(frozen=True)
class Prediction(Spread):
    """The posterior predictive at N rows, from S draws; every tensor is on the CPU.

    Attributes
    ----------
    draws
        (S, N, …): E[y | x, zₛ], one function a row of the tensor.
    samples
        (S, N, …): y ~ p(y | x, zₛ), the function with its noise.
    noise
        (N, …): E_z Var[y | x, z], the variance that stays when z is known.
    """

    site: str
    draws: Tensor
    samples: Tensor
    noise: Tensor

    @property
    def mean(self) -> Tensor:
        """E[y | x], shape (N, …)."""
        return self.draws.mean(0)

    @property
    def epistemic(self) -> Tensor:
        """Var_z E[y | x, z], shape (N, …): what more data would reduce."""
        return self.draws.var(0, correction=0)

    def interval(self, prob: float = 0.9, of: str = "observations") -> Interval:
        """The central interval that holds ``prob`` of new observations, or of ``of="functions"``.

        Raises
        ------
        ValueError
            Unless 0 < prob < 1 and ``of`` is one of the two.
        """
        return Interval(*self.quantiles(tails(prob), of))

    def quantiles(self, levels: Sequence[float], of: str = "observations") -> Tensor:
        """The quantiles at Q ``levels`` of observations, or of ``of="functions"``, shape (Q, N, …).

        Raises
        ------
        ValueError
            Unless ``of`` is one of the two.
        """
        values = self.samples if one_of(of, "of", OF) == "observations" else self.draws
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=0))
        return torch.stack([quantile(ordered, level) for level in levels])


@dataclass(frozen=True)
class ClassPrediction(Labelled):
    """Class probabilities at N rows, from S draws; every tensor is on the CPU.

    Attributes
    ----------
    draws
        (S, N, C): p(class | x, zₛ), one function a row of the tensor.
    samples
        (S, N): a class drawn from each.
    """

    site: str
    draws: Tensor
    samples: Tensor

    @property
    def probs(self) -> Tensor:
        """p(class | x), shape (N, C)."""
        return self.draws.mean(0)

    @property
    def entropy(self) -> Tensor:
        """H[y | x] = −Σ p log p in nats, shape (N,): all uncertainty about the class."""
        return _entropy(self.probs)

    @property
    def mutual_information(self) -> Tensor:
        """I[y; z | x] = H[E_z p] − E_z H[p] in nats, shape (N,): the part that more data would reduce.

        Houlsby, Huszár, Ghahramani, Lengyel (2011), Bayesian active learning by disagreement.
        """
        return (self.entropy - _entropy(self.draws).mean(0)).clamp_min(0)

    @property
    def variation_ratio(self) -> Tensor:
        """1 − f/S, shape (N,): the share of the S sampled classes that are not the most frequent one.

        Freeman (1965), Elementary applied statistics, as in Gal (2016), Uncertainty in deep learning.
        """
        counts = torch.nn.functional.one_hot(self.samples.long(), self.draws.shape[-1]).sum(0)
        return 1 - counts.max(-1).values / len(self.samples)


def tails(prob: float) -> tuple[float, float]:
    """The levels of the two quantiles between which the central interval of ``prob`` lies.

    >>> tails(0.5)
    (0.25, 0.75)
    """
    tail = (1 - share(prob, "prob")) / 2
    return tail, 1 - tail


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)


def quantile(ordered: Tensor, q: float) -> Tensor:
    """Along sorted draws, interpolated; ``torch.quantile`` refuses large inputs."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def _model_at(model: Model, latents: Latents) -> Model:
    """The model with its latents set and its observations drawn."""
    return poutine.condition(poutine.uncondition(model), data=dict(latents))


def at_latents(model: Model, latents: Latents, args: tuple[Any, ...], site: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the model says of ``site`` at one z: mean and variance, or class probabilities alone; and a sample."""
    nodes = poutine.trace(_model_at(model, latents)).get_trace(*args).nodes
    if site not in nodes:
        raise ValueError(f"the model has no site {site!r} when run on the new data: it must not depend on y")
    return _describe(nodes[site]["fn"]), nodes[site]["value"]


def predictive(
    model: Model, latents: Latents, draws: int, args: tuple[Any, ...], site: str, at_once: int | None = None
) -> Prediction | ClassPrediction:
    """Run the model at S draws of the latents, ``{site: (S, *site shape)}``, and collect what it says of ``site``.

    ``at_once`` is how many draws to run together, if it is known.
    """

    def run(z: Latents) -> tuple[tuple[Tensor, ...], Tensor]:
        return at_latents(model, z, args, site)

    described, samples = for_each_draw(run, latents, draws, at_once or draws_together(args))
    if len(described) == 1:
        return ClassPrediction(site, described[0], samples)
    means, variances = described
    if torch.isfinite(means).all():
        return Prediction(site, means, samples, variances.mean(0))
    # No finite mean, as under a Cauchy: the draws themselves are all there is.
    return Prediction(site, samples, samples, torch.zeros_like(samples[0]))


def joined(parts: list[Prediction | ClassPrediction]) -> Prediction | ClassPrediction:
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
    model: Model, latents: Latents, draws: int, args: tuple[Any, ...], sites: list[str]
) -> dict[str, Tensor]:
    """log p(yₙ | zₛ) at each observed site, shape (S, N, …), without plate scales."""

    def run(z: Latents) -> dict[str, Tensor]:
        nodes = poutine.trace(poutine.condition(model, data=dict(z))).get_trace(*args).nodes
        drawn = [site for site in sites if not nodes[site]["is_observed"]]
        if drawn:
            raise ValueError(f"it draws {drawn} rather than observe them: give their data too, in the order of the fit")
        return {site: nodes[site]["fn"].log_prob(nodes[site]["value"]) for site in sites}

    found: dict[str, Tensor] = for_each_draw(run, latents, draws, draws_together(args))
    return found
