"""A model run with some of its sites in units of their priors: what a guide that solves for them reads off it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["LinearModel", "run_in_units"]


@dataclass(frozen=True)
class LinearModel:
    """Result of one run: the priors of the sites v, (D,) together, and the M observations with their Normals.

    ``loc``, ``scale`` and ``value`` are (M,), all observed sites one after the other.
    """

    priors: Mapping[str, dist.Normal]
    loc: Tensor
    scale: Tensor
    value: Tensor

    @property
    def parts(self) -> dict[str, slice]:
        """Return the slice of e for each site, in the order of the model."""
        ends = accumulate((prior.mean.numel() for prior in self.priors.values()), initial=0)
        return {name: slice(*ends) for name, ends in zip(self.priors, pairwise(ends), strict=True)}

    @property
    def size(self) -> int:
        """D."""
        return sum(prior.mean.numel() for prior in self.priors.values())


def run_in_units(
    model: Callable[..., Any], args: tuple[Any, ...], given: Mapping[str, Tensor], names: Iterable[str], e: Tensor
) -> LinearModel:
    """Run ``model`` with the sites ``names`` at mean + sd ⊙ e, e (D,) or one number, the others at ``given``.

    Nothing outside notices the sites of this run.

    Raises
    ------
    ValueError
        If a prior of ``names`` or an observed site is not Normal, or nothing is observed.
    """
    at = _InUnits(set(names), e)
    with poutine.block(), at:
        nodes = poutine.trace(poutine.condition(model, data=given)).get_trace(*args).nodes
    observed = [s for s in nodes.values() if s["type"] == "sample" and s["is_observed"] and s["name"] not in given]
    if not observed:
        raise ValueError("the model observes nothing: pass the data that it observes")
    normals = [_normal(site) for site in observed]
    return LinearModel(
        at.priors,
        torch.cat([normal.mean.reshape(-1) for normal in normals]),
        torch.cat([normal.stddev.reshape(-1) for normal in normals]),
        torch.cat([site["value"].reshape(-1) for site in observed]),
    )


class _InUnits(Messenger):
    """Puts the sites ``names`` at e in units of their priors, which it keeps."""

    def __init__(self, names: set[str], e: Tensor) -> None:
        super().__init__()
        self.priors: dict[str, dist.Normal] = {}
        self._names = names
        self._left = e

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self._names:
            return
        prior = _normal(msg)
        e = self._left
        if e.dim():
            e, self._left = e.split([prior.mean.numel(), len(e) - prior.mean.numel()])
            e = e.reshape(prior.mean.shape)
        self.priors[msg["name"]] = prior
        msg["value"] = prior.mean + prior.stddev * e
        msg["done"] = True


def _normal(site: Any) -> dist.Normal:
    fn = site["fn"]
    while isinstance(fn, dist.Independent | torch.distributions.Independent):
        fn = fn.base_dist
    if not isinstance(fn, torch.distributions.Normal):
        raise ValueError(f"site {site['name']!r} is {type(fn).__name__}: conditional_normal needs a Normal there")
    return fn
