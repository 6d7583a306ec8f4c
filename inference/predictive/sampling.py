"""Draw latents from the guide, for all rows or batches of them, and run the model at the draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical, MaskedDistribution
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from inference.data.arguments import row_count
from inference.model.bound_model import BoundModel, name_of
from inference.model.elbo import Model
from inference.model.guide_density import as_points, draws_at_once
from inference.model.protocols import SupportsRowDraws, supports
from inference.model.sites import base_distribution, latent_values
from inference.model.vectorization import draws_together, map_over_draws, rows_together
from inference.predictive.prediction import ClassPrediction, LatentValues, Prediction
from inference.utils.validation import positive_integer

__all__ = [
    "Batch",
    "Draws",
    "LatentSampler",
    "at_latents",
    "check_draws",
    "concatenate",
    "count_of",
    "likelihood_of",
    "predictive",
    "row_parts",
]

Draws = int | Mapping[str, Any]  # a number of draws, or the draws themselves


@dataclass(frozen=True)
class Batch:
    """Some rows of the arguments, the model to run on them, and S ``draws`` of what the guide knows of its latents."""

    args: tuple[Any, ...]
    model: Model
    latents: dict[str, Tensor]
    draws: int


@dataclass(frozen=True)
class LatentSampler:
    """Draws z ~ q of a fitted ``bound_model``, whose data was ``trained``.

    All calls belong inside ``bound_model.running``.
    """

    bound_model: BoundModel
    trained: tuple[Any, ...]

    def draw(self, count: int, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """Return S draws of the guide, ``{site: (S, *site shape)}``."""
        many = draws_at_once(self.bound_model.guide, args, count)
        return many if many is not None else self._drawn(count, args, {})

    def batches(
        self,
        draws: int | dict[str, Tensor],
        args: tuple[Any, ...],
        batch_size: int | None = None,
        per_row: bool = False,
    ) -> Iterator[Batch]:
        """Yield S draws for one batch of rows after the other; each draw is one function of all, unless ``per_row``.

        ``draws`` is S, or the draws themselves for the rows of the fit. A batch
        has at most ``batch_size`` rows, and fewer where that many would not be
        run at all draws together.

        Latents of single rows are cut to the batch where the rows are those of
        the fit, else drawn for each batch given the shared ones: by the guide
        if it takes new rows, by the model if not.
        """
        parts = row_parts(args, batch_size and min(batch_size, rows_together(args, count_of(draws))))
        at = self.functions(draws, parts[0][1], per_row, self.is_trained(args))
        yield from (at(rows, part) for rows, part in parts)

    def functions(
        self, draws: int | dict[str, Tensor], first: tuple[Any, ...], per_row: bool, trained: bool
    ) -> Callable[[slice, tuple[Any, ...]], Batch]:
        """Draw S functions of all rows, at the rows ``first``, and return what makes a batch of the rows at any slice.

        ``trained`` says that the rows are those of the fit, in whole.
        """
        count, model = count_of(draws), self.bound_model.model
        if per_row:
            anew = self._anew_for_each_row()
            return lambda rows, args: Batch(args, anew, {}, count)
        own = self.row_sites()
        if trained:
            whole = draws if isinstance(draws, dict) else self.draw(count, self.trained)
            return lambda rows, args: Batch(args, model, _cut(whole, own, rows), count)
        drawn = draws if isinstance(draws, dict) else self.draw(count, first)
        known = {name: value for name, value in drawn.items() if name not in own}

        def at(rows: slice, args: tuple[Any, ...]) -> Batch:
            is_first = args is first and not isinstance(draws, dict)
            if is_first:
                found = drawn
            elif own and not isinstance(self.bound_model.guide, AutoGuide):  # latents of rows, given the shared ones
                found = known | self._drawn(count, args, known)
            else:
                found = known
            stale = self._stale(found, own, args)
            return Batch(args, model, {n: v for n, v in found.items() if n not in stale}, count)

        return at

    def _drawn(self, count: int, args: tuple[Any, ...], given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draw the latents that are not ``given`` S times, by running the guide."""
        guide = self.bound_model.guide

        def run(z: dict[str, Tensor]) -> dict[str, Tensor]:
            return latent_values(poutine.trace(poutine.condition(guide, data=z) if z else guide).get_trace(*args))

        at_once = draws_together(args) if self.row_sites() else count  # shared latents do not depend on the rows
        drawn: dict[str, Tensor] = map_over_draws(run, given, count, at_once)
        return {name: value.to(self.bound_model.device) for name, value in drawn.items()}

    def _anew_for_each_row(self) -> Model:
        """The model with its latents drawn by the guide, those of each row apart."""
        model, guide = self.bound_model.model, self.bound_model.guide
        if not supports(guide, SupportsRowDraws):
            raise ValueError(
                f"per_row is for bernoulli_dropout: a draw of {name_of(guide)} is a function of all rows, leave it out"
            )

        def anew(*args: Any) -> Any:
            with poutine.block():
                drawn = poutine.trace(guide.draw_for_each_row).get_trace(*args)
            return poutine.replay(model, trace=drawn)(*args)

        return anew

    def row_sites(self) -> dict[str, int]:
        """Return the latents that each row has of its own, with the dimension in which the rows lie."""
        rows = row_count(self.trained)
        sites = [site for site in self.bound_model.latents if rows in site.shape[: site.batch_dims]]
        return {site.name: site.shape.index(rows) for site in sites if rows is not None}

    def is_trained(self, args: tuple[Any, ...]) -> bool:
        """Return True if these are the rows of the fit."""
        if args is self.trained:
            return True
        if row_count(args) != row_count(self.trained) or not args:
            return False
        one, other = args[0], self.trained[0]
        alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
        return alike and torch.equal(one, other)

    def _stale(self, drawn: dict[str, Tensor], own: dict[str, int], args: tuple[Any, ...]) -> set[str]:
        """Latents of single rows that the guide gives for the rows of the fit alone."""
        if isinstance(self.bound_model.guide, AutoGuide):
            return set(own)
        trained, rows = row_count(self.trained), row_count(args)
        return {name for name, dim in own.items() if drawn[name].shape[dim + 1] == trained != rows}


def row_parts(args: tuple[Any, ...], size: int | None) -> list[tuple[slice, tuple[Any, ...]]]:
    """Cut the arguments into batches of rows."""
    rows = row_count(args)
    if rows is None or size is None or size >= rows:
        return [(slice(None), args)]
    cuts = [slice(begin, begin + size) for begin in range(0, rows, size)]
    return [(cut, tuple(v[cut] if isinstance(v, Tensor) and v.dim() else v for v in args)) for cut in cuts]


def count_of(draws: int | dict[str, Tensor]) -> int:
    """Return S, of a number or of the draws themselves."""
    return draws if isinstance(draws, int) else len(next(iter(draws.values())))


def check_draws(draws: Draws, bound_model: BoundModel) -> int | dict[str, Tensor]:
    """Return the number of draws to take, or the draws that are given, checked against the latents.

    Raises
    ------
    ValueError
        If the draws lack a latent, or have another shape.
    """
    if not isinstance(draws, Mapping):
        return positive_integer(draws, "draws")
    points, leading = as_points(draws, bound_model)
    if len(leading) != 1 or not leading[0]:
        raise ValueError(f"the draws have leading dimensions {leading}: give S draws, {{site: (S, *site shape)}}")
    return points


def _cut(drawn: dict[str, Tensor], own: dict[str, int], rows: slice) -> dict[str, Tensor]:
    """Return the draws, those of single rows for these ``rows`` alone."""
    moved = {name: value.movedim(own[name] + 1, 0)[rows] for name, value in drawn.items() if name in own}
    return drawn | {name: value.movedim(0, own[name] + 1) for name, value in moved.items()}


def at_latents(
    model: Model, latents: LatentValues, args: tuple[Any, ...], site: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return mean and variance of ``site`` at one z, or class probabilities alone, and a sample."""
    conditioned = poutine.condition(poutine.uncondition(model), data=dict(latents))
    nodes = poutine.trace(conditioned).get_trace(*args).nodes
    if site not in nodes:
        raise ValueError(f"the model has no site {site!r} when run on the new data: it must not depend on y")
    return _describe(nodes[site]["fn"]), nodes[site]["value"]


def predictive(
    model: Model, latents: LatentValues, draws: int, args: tuple[Any, ...], site: str, at_once: int | None = None
) -> Prediction | ClassPrediction:
    """Run the model at S draws of the latents, ``{site: (S, *site shape)}``, and collect the predictions of ``site``.

    ``at_once`` is the number of draws to run together, if it is known.
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
    """Join the predictions of one batch of rows after the other."""
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
    """Return class probabilities alone if the site is a class, else mean and variance."""
    base = base_distribution(fn)
    if isinstance(base, Categorical):
        return (base.probs,)
    if isinstance(base, Bernoulli) and len(fn.shape()) == 1:
        return (torch.stack([1 - base.probs, base.probs], -1),)
    inner = fn
    while isinstance(inner, MaskedDistribution):
        inner = inner.base_dist
    try:
        moments = inner.mean, inner.variance
    except NotImplementedError:
        draws = inner.sample((256,))
        moments = draws.mean(0), draws.var(0)
    return tuple(moment.expand(fn.shape()) for moment in moments)


def likelihood_of(
    model: Model, latents: LatentValues, draws: int, args: tuple[Any, ...], sites: list[str]
) -> dict[str, Tensor]:
    """Return log p(yₙ | zₛ) at each observed site, shape (S, N, …), without plate scales."""

    def run(z: LatentValues) -> dict[str, Tensor]:
        nodes = poutine.trace(poutine.condition(model, data=dict(z))).get_trace(*args).nodes
        drawn = [site for site in sites if not nodes[site]["is_observed"]]
        if drawn:
            raise ValueError(f"it draws {drawn} rather than observe them: give their data too, in the order of the fit")
        return {site: nodes[site]["fn"].log_prob(nodes[site]["value"]) for site in sites}

    found: dict[str, Tensor] = map_over_draws(run, latents, draws, draws_together(args))
    return found
