"""The log weight log p(x, z) − log q(z), from which the ELBO and every check of a fit are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

__all__ = ["Model", "log_weight", "loss", "traces"]

Model = Callable[..., Any]


def traces(model: Model, guide: Model, args: tuple[Any, ...]) -> tuple[poutine.Trace, poutine.Trace]:
    """One draw z from the guide, and the model run at that z: ``(model_trace, guide_trace)``."""
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, Messenger):  # Pyro's guides that rewrite the model as it runs
        guide(*args)
        model_trace, guide_trace = messenger.get_traces()
    else:
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def log_weight(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """log w = log p(x, z) − log q(z), a scalar in nats, scales and masks included."""
    return _log_density(model_trace) - _log_density(guide_trace)


def _log_density(trace: poutine.Trace) -> Tensor:
    # Scalars are stacked and summed once: half the autograd nodes of Trace.log_prob_sum.
    sites = (site for site in trace.nodes.values() if site["type"] == "sample")
    terms = [torch.as_tensor(scale_and_mask(_log_prob(site), site["scale"], site["mask"])) for site in sites]
    return torch.stack([term.sum() if term.dim() else term for term in terms]).sum() if terms else torch.zeros(())


def _log_prob(site: Any) -> Tensor:
    fn, value = site["fn"], site["value"]
    if type(fn) is Delta and value.data_ptr() == fn.v.data_ptr() and value.shape == fn.v.shape:
        return torch.as_tensor(fn.log_density)  # drawn from this Delta: the point itself has log density 0
    return torch.as_tensor(fn.log_prob(value, *site["args"], **site["kwargs"]))


def loss(model: Model, guide: Model, args: tuple[Any, ...], particles: int, reparameterized: bool) -> Tensor:
    """−ELBO in nats, estimated from ``particles`` draws, with Trace_ELBO's gradient.

    With a reparameterised guide, loss = −(1/S) Σₛ log w(zₛ) and autograd gives
    its gradient. Otherwise Pyro's :class:`~pyro.infer.Trace_ELBO` adds the
    score-function terms.

    References
    ----------
    Ranganath, Gerrish, Blei (2014), Black box variational inference.
    Kingma, Welling (2014), Auto-encoding variational Bayes.
    """
    if not reparameterized:
        return Trace_ELBO(num_particles=particles).differentiable_loss(model, guide, *args)
    total = sum(log_weight(*traces(model, guide, args)) for _ in range(particles))
    return torch.as_tensor(-total / particles)
