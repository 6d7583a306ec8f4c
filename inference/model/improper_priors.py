"""Flat priors, which nothing can be drawn from, made to give a value to start at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

__all__ = ["DrawableFlats", "let_flat_priors_start"]


class DrawableFlats(Messenger):
    """Inside, ``ImproperUniform`` sites can be drawn: h(0), or h(ε), ε ~ N(0, I), if ``spread``; densities stay 1.

    h takes the real line to the support. It has to be the innermost handler, so
    that Pyro's ``InitMessenger`` sees sites that can be drawn.
    """

    def __init__(self, spread: bool = False) -> None:
        super().__init__()
        self._spread = spread

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["value"] is None:
            msg["fn"] = _drawable(msg["fn"], self._spread)


def let_flat_priors_start(guide: Callable[..., Any]) -> None:
    """Let Pyro's autoguides in ``guide`` lay out a model with flat priors: their references to it change in place."""
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    for part in parts:
        if isinstance(part, AutoGuide) and part._model is not None:  # a used guide that was copied has none
            part._model = (_innermost(part.model),)


class _DrawableUniform(dist.ImproperUniform):
    def __init__(self, support: Any, batch_shape: torch.Size, event_shape: torch.Size, spread: bool) -> None:
        super().__init__(support, batch_shape, event_shape)
        self._spread = spread

    def expand(self, batch_shape: Any, _instance: Any = None) -> _DrawableUniform:
        return _DrawableUniform(self._support, torch.Size(batch_shape), self.event_shape, self._spread)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        to_support = biject_to(self._support)
        shape = to_support.inverse_shape(torch.Size(sample_shape) + self.batch_shape + self.event_shape)
        drawn: Tensor = to_support(torch.randn(shape) if self._spread else torch.zeros(shape))
        return drawn


def _drawable(fn: Any, spread: bool) -> Any:
    if type(fn) is dist.ImproperUniform:
        return _DrawableUniform(fn._support, fn.batch_shape, fn.event_shape, spread)
    if isinstance(fn, dist.MaskedDistribution):
        base = _drawable(fn.base_dist, spread)
        return fn if base is fn.base_dist else dist.MaskedDistribution(base, fn._mask)
    if isinstance(fn, dist.Independent):
        base = _drawable(fn.base_dist, spread)
        return fn if base is fn.base_dist else dist.Independent(base, fn.reinterpreted_batch_ndims)
    return fn


def _innermost(model: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` with the handlers that it was wrapped in, and :class:`DrawableFlats` under them all."""
    wrapped = getattr(model, "func", None)
    if isinstance(wrapped, partial) and len(wrapped.args) == 2 and isinstance(wrapped.args[0], Messenger):
        handler, under = wrapped.args
        inner: Callable[..., Any] = handler(_innermost(under))
        return inner
    outermost: Callable[..., Any] = DrawableFlats()(model)
    return outermost
