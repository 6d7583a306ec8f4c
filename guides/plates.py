"""What a guide has to know of a model: its latents, and the plates of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["Look", "first_rows", "look", "row_count"]


@dataclass(frozen=True)
class Look:
    """One run of a model on two rows: the nodes of its latents by name, and the names of the plates over its rows."""

    latents: dict[str, Any]
    plates: tuple[str, ...]

    def is_of_rows(self, name: str) -> bool:
        """Whether each row has this latent of its own."""
        return any(frame.name in self.plates for frame in self.latents[name]["cond_indep_stack"])


def look(model: Callable[..., Any], args: tuple[Any, ...]) -> Look:
    """Run ``model`` on the first two rows of ``args``; neither parameters nor handlers outside notice."""
    few = tuple(value[:2] if isinstance(value, Tensor) and value.dim() else value for value in args)
    with torch.no_grad(), poutine.block(), pyro.get_param_store().scope():
        nodes = poutine.trace(model).get_trace(*few).nodes
    sites = {name: site for name, site in nodes.items() if site["type"] == "sample"}
    latents = {n: site for n, site in sites.items() if not site["is_observed"] and not site_is_subsample(site)}
    plates = [n for n, site in sites.items() if site_is_subsample(site) and len(site["value"]) == row_count(few)]
    return Look(latents, tuple(plates))


def first_rows(args: tuple[Any, ...]) -> Tensor:
    """The first argument that has rows."""
    return next(value for value in args if isinstance(value, Tensor) and value.dim())


def row_count(args: tuple[Any, ...]) -> int:
    """N, the rows of the first argument that has any."""
    return len(first_rows(args))
