"""Structure of a model that a guide has to know: its latents, and the plates over its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["ModelStructure", "first_rows", "model_structure", "row_count"]


@dataclass(frozen=True)
class ModelStructure:
    """Nodes of a model's latents by name, and names of the plates over its rows, from a run on two rows."""

    latents: dict[str, Any]
    plates: tuple[str, ...]

    def is_of_rows(self, name: str) -> bool:
        """Return True if each row has this latent of its own."""
        return any(frame.name in self.plates for frame in self.latents[name]["cond_indep_stack"])


def model_structure(model: Callable[..., Any], args: tuple[Any, ...]) -> ModelStructure:
    """Run ``model`` on the first two rows of ``args``; parameters and handlers outside stay as they are."""
    few = tuple(value[:2] if isinstance(value, Tensor) and value.dim() else value for value in args)
    with torch.no_grad(), poutine.block(), pyro.get_param_store().scope():
        nodes = poutine.trace(model).get_trace(*few).nodes
    sites = {name: site for name, site in nodes.items() if site["type"] == "sample"}
    latents = {n: site for n, site in sites.items() if not site["is_observed"] and not site_is_subsample(site)}
    plates = [n for n, site in sites.items() if site_is_subsample(site) and len(site["value"]) == row_count(few)]
    return ModelStructure(latents, tuple(plates))


def first_rows(args: tuple[Any, ...]) -> Tensor:
    """The first argument that has rows."""
    return next(value for value in args if isinstance(value, Tensor) and value.dim())


def row_count(args: tuple[Any, ...]) -> int:
    """N, the rows of the first argument that has any."""
    return len(first_rows(args))
