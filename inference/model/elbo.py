"""The log weight log p(x, z) − log q(z), from which the ELBO and every check of a fit are made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from inference.model.protocols import SupportsFixed, supports

__all__ = ["Model", "log_density", "log_weight", "loss", "traces", "traces_with_plates"]

Model = Callable[..., Any]


def traces(model: Model, guide: Model, args: tuple[Any, ...]) -> tuple[poutine.Trace, poutine.Trace]:
    """One draw z from the guide, and the model run at that z: ``(model_trace, guide_trace)``."""
    model_trace, guide_trace = traces_with_plates(model, guide, args)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def traces_with_plates(model: Model, guide: Model, args: tuple[Any, ...]) -> tuple[poutine.Trace, poutine.Trace]:
    """The two traces with the sites at which plates choose their rows."""
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, Messenger):  # Pyro's guides that rewrite the model as it runs
        guide(*args)
        model_trace, guide_trace = messenger.get_traces()
    else:
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return model_trace, guide_trace


def log_weight(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """log w = log p(x, z) − log q(z), a scalar in nats, scales and masks included."""
    return log_density(model_trace) - log_density(guide_trace)


def log_density(trace: poutine.Trace) -> Tensor:
    """The sum of log densities over all sites of a trace, a scalar in nats, scales and masks included."""
    return _log_density(_samples(trace))


def _estimate(
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
    beta: float | Tensor | None,
    sticking_the_landing: bool = False,
) -> Tensor:
    """(2,): −log w, with the gradient of −(β log p(x, z) − log q(z)), and the part of it that is KL(q ‖ p(z)).

    Where a guide draws in another space, a Delta site holds the change of
    density back to the model's; it belongs to the target, which is so
    flattened where the guide draws, and stays a density there.
    """
    exact = _closed_forms(model_trace, guide_trace) if beta is None else {}
    drawn = [site for site in _samples(guide_trace) if site["name"] not in exact]
    latents = [site for site in _samples(model_trace) if not site["is_observed"] and site["name"] not in exact]
    prior = _log_density(latents) - _log_density([site for site in drawn if type(site["fn"]) is Delta])
    of_guide = [site for site in drawn if type(site["fn"]) is not Delta]
    entropy = _log_density(
        [{**site, "fn": _fixed(site["fn"])} for site in of_guide] if sticking_the_landing else of_guide
    )
    divergence = sum(exact.values(), entropy)
    target = _log_density([site for site in _samples(model_trace) if site["is_observed"]]) + prior
    if beta is not None:
        target = target.detach() * (1 - beta) + target * beta
    return torch.stack([divergence - target, divergence - prior])


def _fixed(fn: Any) -> Any:
    """A Normal of any kind, or what says itself how, with its parameters cut off from their gradient."""
    if supports(fn, SupportsFixed):
        return fn.fixed()
    twin = copy.copy(fn)
    for name, value in vars(fn).items():
        if isinstance(value, Tensor):
            vars(twin)[name] = value.detach()
        elif isinstance(value, Distribution):
            vars(twin)[name] = _fixed(value)
    return twin


def _closed_forms(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> dict[str, Tensor]:
    """KL(q(z) ‖ p(z)) of the sites that the guide marks for it, where torch or Pyro has it in closed form."""
    found = {}
    for site in _samples(guide_trace):
        name, prior = site["name"], model_trace.nodes.get(site["name"])
        if prior is None or not site["infer"].get("closed_form_kl"):
            continue
        if _are_same(site["fn"], prior["fn"]):
            found[name] = torch.zeros_like(site["value"].sum())
            continue
        if site["fn"].shape() != prior["fn"].shape():  # torch's formulas do not all broadcast
            continue
        with suppress(NotImplementedError):
            divergence = kl_divergence(site["fn"], prior["fn"])
            found[name] = torch.as_tensor(scale_and_mask(divergence, site["scale"], site["mask"])).sum()
    return found


def _are_same(one: Any, other: Any) -> bool:
    """Return True if two distributions have equal parameters that are not learned, up to the rows that they are for."""
    while isinstance(one, Independent) and isinstance(other, Independent):
        one, other = one.base_dist, other.base_dist
    if type(one) is not type(other):
        return False
    names = [name for name in getattr(one, "arg_constraints", {}) if name in vars(one) or name in vars(other)]
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    if not pairs or any(not isinstance(v, Tensor) or v.requires_grad for pair in pairs for v in pair):
        return False
    return all(torch.equal(*torch.broadcast_tensors(*pair)) for pair in pairs)


def _samples(trace: poutine.Trace) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _log_density(sites: list[Any]) -> Tensor:
    # Scalars are stacked and summed once: half the autograd nodes of Trace.log_prob_sum.
    terms = [torch.as_tensor(scale_and_mask(_log_prob(site), site["scale"], site["mask"])) for site in sites]
    return torch.stack([term.sum() if term.dim() else term for term in terms]).sum() if terms else torch.zeros(())


def _log_prob(site: Any) -> Tensor:
    fn, value = site["fn"], site["value"]
    if type(fn) is Delta and _is_same(value, fn.v):
        return torch.as_tensor(fn.log_density)  # drawn from this Delta: the point itself has log density 0
    return torch.as_tensor(fn.log_prob(value, *site["args"], **site["kwargs"]))


def _is_same(value: Tensor, other: Tensor) -> bool:
    try:
        return value.data_ptr() == other.data_ptr() and value.shape == other.shape
    except RuntimeError:  # inside torch.vmap a tensor has no memory of its own
        return False


def loss(
    model: Model,
    guide: Model,
    args: tuple[Any, ...],
    particles: int,
    reparameterized: bool,
    beta: float | Tensor | None = None,
    sticking_the_landing: bool = False,
) -> Tensor:
    """(2,): −ELBO in nats, estimated from ``particles`` draws, with Trace_ELBO's gradient; and its part KL(q ‖ p(z)).

    −ELBO = KL(q ‖ p(z)) − E_q log p(x | z), where p(x | z) has all that is
    observed, factors too. The KL is NaN where score-function terms are needed.

    With a reparameterised guide, loss = −(1/S) Σₛ log w(zₛ) and autograd gives
    its gradient. At sites that the guide draws with
    ``infer={"closed_form_kl": True}`` KL(q ‖ p(z)) takes the place of its
    estimate; right where q(z) given all that p(z | …) depends on is that same
    q. Otherwise Pyro's :class:`~pyro.infer.Trace_ELBO` adds the score-function
    terms.

    With β the gradient is that of −E_q [β log p(x, z) − log q(z)], the annealed
    target's; the number is −ELBO all the same. It needs a reparameterised guide.

    With ``sticking_the_landing`` the gradient leaves out the score ∂ log q_θ(z)/∂θ at fixed
    z, whose mean is 0: at q = p it has no variance. For guides of Normals, and
    of distributions that have a ``fixed()``.

    References
    ----------
    Ranganath, Gerrish, Blei (2014), Black box variational inference.
    Kingma, Welling (2014), Auto-encoding variational Bayes.
    Roeder, Wu, Duvenaud (2017), Sticking the landing.
    """
    if not reparameterized:
        value = Trace_ELBO(num_particles=particles).differentiable_loss(model, guide, *args)
        return torch.stack([value, torch.full_like(value, torch.nan)])
    total = sum(_estimate(*traces(model, guide, args), beta, sticking_the_landing) for _ in range(particles))
    return torch.as_tensor(total / particles)
