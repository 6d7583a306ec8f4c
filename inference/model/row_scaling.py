"""The scale by which a batch of rows stands for all rows."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from inference.data.arguments import row_count
from inference.model.bound_model import BoundModel, name_of
from inference.model.sites import latent_values
from inference.model.subsampling import SubsampleScale
from inference.utils.random_state import RandomStream

__all__ = ["row_scale"]


def row_scale(bound_model: BoundModel, args: tuple[Any, ...], rows: int) -> SubsampleScale:
    """Return the scale that makes the batch ``args`` stand for all ``rows`` in model and guide.

    Raises
    ------
    ValueError
        If the model observes rows outside of a plate over them, or an autoguide
        would keep a distribution for each row of a batch.
    """
    batch = row_count(args) or 1
    scale = SubsampleScale(rows / batch)
    longer = tuple(torch.cat([v, v[:1]]) if isinstance(v, Tensor) and v.dim() else v for v in args)
    automatic = isinstance(bound_model.guide, AutoGuide)
    with bound_model.running(bound_model.params.flatten(), RandomStream.seeded(0)), torch.no_grad(), scale:
        for given in (longer, args):
            if not automatic:
                poutine.trace(bound_model.guide).get_trace(*given)
            model_trace = poutine.trace(bound_model.model).get_trace(*given)
    scale.require_use(model_trace, rows)
    own = [name for name in latent_values(model_trace) if scale.is_of_rows(model_trace.nodes[name])]
    if own and automatic:
        raise ValueError(
            f"{name_of(bound_model.guide)} keeps a distribution for each row of {own}, and a fit by batches sees new "
            "rows "
            "at each step: use a guide that computes them from the row, such as amortized_encoder"
        )
    return scale
