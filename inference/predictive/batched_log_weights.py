"""Importance weights on rows that are read a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.arguments import row_count
from inference.data.batch_loader import BatchLoader
from inference.model.bound_model import BoundModel
from inference.model.elbo import Model, log_density, traces
from inference.model.sites import latent_values
from inference.model.subsampling import SubsampleScale
from inference.model.vectorization import draws_together, map_over_draws, rows_together
from inference.predictive.latent_sampler import row_parts

__all__ = ["weighted_by_batches"]

_TOGETHER = 4  # times as many as where what is computed is kept for each row


def weighted_by_batches(
    bound_model: BoundModel, batches: BatchLoader, scale: SubsampleScale, draws: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of q, ``{site: (S, *site shape)}``, and log p(x, z) − log q(z) of each on all rows in nats, (S,) in double.

    log w(z) = log p(z) − log q(z) + Σₙ log p(xₙ | z), where the sum is over what
    is inside the plates over rows that ``scale`` knows, one reading of all rows
    for all draws. For latents that rows share; inside ``bound_model.running``.
    """

    def begin(_: object) -> tuple[dict[str, Tensor], Tensor]:
        model_trace, guide_trace = traces(bound_model.model, bound_model.guide, batches.first)
        return latent_values(guide_trace), _density(model_trace, scale, False) - log_density(guide_trace)

    found: tuple[dict[str, Tensor], Tensor] = map_over_draws(begin, {}, draws, draws_together(batches.first))
    drawn, total = found[0], found[1].double()
    with tqdm(desc="weights", total=batches.num_data, unit="row", delay=1, leave=False) as bar:
        for piece in batches.once():
            for _, part in row_parts(piece, _TOGETHER * rows_together(piece, draws)):
                total += map_over_draws(_of_rows(bound_model.model, scale, part), drawn, draws, draws)
            bar.update(row_count(piece) or 0)
    return drawn, total


def _of_rows(model: Model, scale: SubsampleScale, args: tuple[Any, ...]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def run(z: Mapping[str, Tensor]) -> Tensor:
        return _density(poutine.trace(poutine.condition(model, data=dict(z))).get_trace(*args), scale, True)

    return run


def _density(trace: poutine.Trace, scale: SubsampleScale, of_rows: bool) -> Tensor:
    """The sum of log densities inside the plates over rows, or of all others."""
    total = torch.zeros((), dtype=torch.float64)
    for site in trace.nodes.values():
        if site["type"] == "sample" and scale.is_of_rows(site) == of_rows and not poutine.util.site_is_subsample(site):
            value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            total = total + torch.as_tensor(scale_and_mask(value, site["scale"], site["mask"])).double().sum()
    return total
