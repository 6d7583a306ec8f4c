"""Predictions: one draw of the latents gives one function of all rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical
from torch import Tensor

from inference.objective import Model
from inference.sites import base_distribution

__all__ = ["ClassPrediction", "Interval", "Prediction", "log_likelihood", "predictive"]

Latents = Mapping[str, Tensor]


class Interval(NamedTuple):
    """Lower and upper ends, each of the prediction's row shape."""

    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Prediction:
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

    @property
    def variance(self) -> Tensor:
        """Var[y | x] = Var_z E[y | x, z] + E_z Var[y | x, z], shape (N, …)."""
        return self.epistemic + self.noise

    @property
    def std(self) -> Tensor:
        """The square root of :attr:`variance`, in the units of y."""
        return self.variance.sqrt()

    def interval(self, prob: float = 0.9, of: str = "observations") -> Interval:
        """The central interval that holds ``prob`` of new observations, or of ``of="functions"``.

        Raises
        ------
        ValueError
            Unless 0 < prob < 1 and ``of`` is one of the two.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob is {prob!r}: pass a share between 0 and 1, such as 0.9")
        if of not in ("observations", "functions"):
            raise ValueError(f"of is {of!r}: pass 'observations' or 'functions'")
        values = self.samples if of == "observations" else self.draws
        tail = (1 - prob) / 2
        ends = [_quantile(values, q) for q in (tail, 1 - tail)]
        return Interval(*ends)


@dataclass(frozen=True)
class ClassPrediction:
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
    def labels(self) -> Tensor:
        """The most probable class, shape (N,)."""
        return self.probs.argmax(-1)

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


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)


def _quantile(values: Tensor, q: float) -> Tensor:
    """Along the draws, interpolated; by sorting, as ``torch.quantile`` refuses large inputs."""
    ordered = values.sort(0).values
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def _model_at(model: Model, latents: Latents) -> Model:
    """The model with its latents set and its observations drawn."""
    return poutine.condition(poutine.uncondition(model), data=dict(latents))


def predictive(
    model: Model, latents: Iterable[Latents], args: tuple[Any, ...], site: str
) -> Prediction | ClassPrediction:
    """Run the model at each draw of the latents and collect what it says of ``site``."""
    nodes = (poutine.trace(_model_at(model, z)).get_trace(*args).nodes for z in latents)
    rows = [(_describe(fn), value.detach().cpu()) for fn, value in _look(nodes, site)]
    samples = torch.stack([value for _, value in rows])
    if len(rows[0][0]) == 1:
        return ClassPrediction(site, torch.stack([probs for (probs,), _ in rows]), samples)
    shape = samples.shape[1:]
    draws = torch.stack([mean.expand(shape) for (mean, _), _ in rows])
    noise = torch.stack([variance.expand(shape) for (_, variance), _ in rows]).mean(0)
    if torch.isfinite(draws).all():
        return Prediction(site, draws, samples, noise)
    # No finite mean, as under a Cauchy: the draws themselves are all there is.
    return Prediction(site, samples, samples, torch.zeros_like(noise))


def _look(nodes: Iterator[Any], site: str) -> Iterator[tuple[Any, Tensor]]:
    for found in nodes:
        if site not in found:
            raise ValueError(f"the model has no site {site!r} when run on the new data: it must not depend on y")
        yield found[site]["fn"], found[site]["value"]


def _describe(fn: Any) -> tuple[Tensor, ...]:
    """Class probabilities alone where the site is a class, else mean and variance; on the CPU."""
    base = base_distribution(fn)
    if isinstance(base, Categorical):
        found: tuple[Tensor, ...] = (base.probs,)
    elif isinstance(base, Bernoulli) and len(fn.shape()) == 1:
        found = (torch.stack([1 - base.probs, base.probs], -1),)
    else:
        found = _moments(fn)
    return tuple(tensor.detach().cpu() for tensor in found)


def _moments(fn: Any) -> tuple[Tensor, Tensor]:
    while type(fn).__name__ == "MaskedDistribution":
        fn = fn.base_dist
    try:
        return fn.mean, fn.variance
    except NotImplementedError:
        draws = fn.sample((256,))
        return draws.mean(0), draws.var(0)


def log_likelihood(
    model: Model, latents: Iterable[Latents], args: tuple[Any, ...], sites: list[str]
) -> dict[str, Tensor]:
    """log p(yₙ | zₛ) at each observed site, shape (S, N, …), without plate scales."""
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for z in latents:
        trace = poutine.trace(poutine.condition(model, data=dict(z))).get_trace(*args)
        for site in sites:
            node = trace.nodes[site]
            found[site].append(node["fn"].log_prob(node["value"]).detach().cpu())
    return {site: torch.stack(values) for site, values in found.items()}
