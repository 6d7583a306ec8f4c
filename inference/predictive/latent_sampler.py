"""Draws of z for the rows at hand: all rows or batches of them, as functions of all rows or anew for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from inference.data.arguments import row_count
from inference.model.bound_model import BoundModel, name_of
from inference.model.elbo import Model
from inference.model.guide_density import draws_at_once
from inference.model.sites import latent_values
from inference.model.vectorization import draws_together, map_over_draws, rows_together

__all__ = ["Batch", "LatentSampler", "how_many", "row_parts"]


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
        """S draws by the guide, ``{site: (S, *site shape)}``."""
        many = draws_at_once(self.bound_model.guide, args, count)
        return many if many is not None else self._drawn(count, args, {})

    def batches(
        self,
        draws: int | dict[str, Tensor],
        args: tuple[Any, ...],
        batch_size: int | None = None,
        per_row: bool = False,
    ) -> Iterator[Batch]:
        """S draws for one batch of rows after the other; each draw is one function of all, unless ``per_row``.

        ``draws`` is S, or the draws themselves for the rows of the fit. A batch
        has at most ``batch_size`` rows, and fewer where that many would not be
        run at all draws together.

        Latents of single rows are cut to the batch where the rows are those of
        the fit, else drawn for each batch given the shared ones: by the guide
        if it takes new rows, by the model if not.
        """
        parts = row_parts(args, batch_size and min(batch_size, rows_together(args, how_many(draws))))
        at = self.functions(draws, parts[0][1], per_row, self.is_trained(args))
        yield from (at(rows, part) for rows, part in parts)

    def functions(
        self, draws: int | dict[str, Tensor], first: tuple[Any, ...], per_row: bool, trained: bool
    ) -> Callable[[slice, tuple[Any, ...]], Batch]:
        """S functions of all rows, drawn at the rows ``first``: what makes a batch of the rows at any slice.

        ``trained`` says that the rows are those of the fit, in whole.
        """
        count, model = how_many(draws), self.bound_model.model
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
            found = drawn if is_first else known | self._given(known, count, args, own)
            stale = self._stale(found, own, args)
            return Batch(args, model, {n: v for n, v in found.items() if n not in stale}, count)

        return at

    def _given(
        self, known: dict[str, Tensor], count: int, args: tuple[Any, ...], own: dict[str, int]
    ) -> dict[str, Tensor]:
        """The latents of single rows, drawn by the guide given the shared ones."""
        return {} if not own or isinstance(self.bound_model.guide, AutoGuide) else self._drawn(count, args, known)

    def _drawn(self, count: int, args: tuple[Any, ...], given: dict[str, Tensor]) -> dict[str, Tensor]:
        """S draws of the latents that are not ``given``, by running the guide."""
        guide = self.bound_model.guide

        def run(z: dict[str, Tensor]) -> dict[str, Tensor]:
            return latent_values(poutine.trace(poutine.condition(guide, data=z) if z else guide).get_trace(*args))

        at_once = draws_together(args) if self.row_sites() else count  # shared latents do not depend on the rows
        drawn: dict[str, Tensor] = map_over_draws(run, given, count, at_once)
        return {name: value.to(self.bound_model.device) for name, value in drawn.items()}

    def _anew_for_each_row(self) -> Model:
        """The model with its latents drawn by the guide, those of each row apart."""
        model, guide = self.bound_model.model, self.bound_model.guide
        draw = getattr(guide, "draw_for_each_row", None)
        if draw is None:
            raise ValueError(
                f"per_row is for bernoulli_dropout: a draw of {name_of(guide)} is a function of all rows, leave it out"
            )

        def anew(*args: Any) -> Any:
            with poutine.block():
                drawn = poutine.trace(draw).get_trace(*args)
            return poutine.replay(model, trace=drawn)(*args)

        return anew

    def row_sites(self) -> dict[str, int]:
        """The latents that each row has of its own, and in which dimension the rows are."""
        rows = row_count(self.trained)
        sites = [site for site in self.bound_model.latents if rows in site.shape[: site.batch_dims]]
        return {site.name: site.shape.index(rows) for site in sites if rows is not None}

    def is_trained(self, args: tuple[Any, ...]) -> bool:
        """Whether these are the rows of the fit."""
        if args is self.trained:
            return True
        return row_count(args) == row_count(self.trained) and bool(args) and _is_same(args[0], self.trained[0])

    def _stale(self, drawn: dict[str, Tensor], own: dict[str, int], args: tuple[Any, ...]) -> set[str]:
        """Latents of single rows that the guide gives for the rows of the fit alone."""
        if isinstance(self.bound_model.guide, AutoGuide):
            return set(own)
        trained, rows = row_count(self.trained), row_count(args)
        return {name for name, dim in own.items() if drawn[name].shape[dim + 1] == trained != rows}


def _is_same(one: Any, other: Any) -> bool:
    alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
    return alike and torch.equal(one, other)


def row_parts(args: tuple[Any, ...], size: int | None) -> list[tuple[slice, tuple[Any, ...]]]:
    """The arguments cut into batches of rows."""
    rows = row_count(args)
    if rows is None or size is None or size >= rows:
        return [(slice(None), args)]
    cuts = [slice(begin, begin + size) for begin in range(0, rows, size)]
    return [(cut, tuple(v[cut] if isinstance(v, Tensor) and v.dim() else v for v in args)) for cut in cuts]


def how_many(draws: int | dict[str, Tensor]) -> int:
    """S, of a number or of the draws themselves."""
    return draws if isinstance(draws, int) else len(next(iter(draws.values())))


def _cut(drawn: dict[str, Tensor], own: dict[str, int], rows: slice) -> dict[str, Tensor]:
    """The draws, those of single rows for these ``rows`` alone."""
    moved = {name: value.movedim(own[name] + 1, 0)[rows] for name, value in drawn.items() if name in own}
    return drawn | {name: value.movedim(0, own[name] + 1) for name, value in moved.items()}
