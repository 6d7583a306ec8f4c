"""Site, parameter and values at which a number stopped being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from inference.model.parameters import Params
from inference.model.sites import base_distribution
from inference.utils.errors import NonFinite

__all__ = ["failure", "first_failure", "refuse_non_finite"]

_ADVICE = (
    "check its prior and support, the scale of the data, and the guide's start; "
    "a smaller lr= helps where it happens later"
)


def refuse_non_finite(model_trace: poutine.Trace, guide_trace: poutine.Trace, when: str) -> None:
    """Raise a ValueError that names the first site whose value or density is not finite, and what is behind it."""
    found = _of_sites(model_trace, guide_trace)
    if found is not None:
        raise ValueError(f"{found[1]} {when}: {found[2]}; {_ADVICE}")


def first_failure(losses: Tensor, good_after: Callable[[int], bool]) -> int:
    """Return the number of steps with these ``losses``, (T,), before the first bad one.

    A step is bad if its loss is not finite, or θ after it: then its gradient
    was not. ``good_after(n)`` takes n of the steps again and says whether θ is
    finite; it is asked log₂ T times.
    """
    bad = (~torch.isfinite(losses)).nonzero()
    count = int(bad[0]) if len(bad) else len(losses)
    if good_after(count):
        return count
    good = 0
    while count - good > 1:
        middle = (good + count) // 2
        good, count = (middle, count) if good_after(middle) else (good, middle)
    return good


def failure(
    params: Params,
    flat_params: Tensor,
    after: Tensor,
    pairs: Iterable[tuple[poutine.Trace, poutine.Trace]],
    step: int,
) -> NonFinite:
    """Return the error of a step from θ = ``flat_params`` to ``after``, which drew these traces of model and guide."""
    where = f"at step {step}"
    for pair in pairs:
        site = _of_sites(*pair)
        if site is not None:
            return NonFinite(f"{site[1]} {where}: {site[2]}; {_ADVICE}", step, site=site[0])
        slope = _of_gradient(*pair, params)
        if slope is not None:
            return NonFinite(f"{slope[2]} {where}: {slope[3]}; {_ADVICE}", step, site=slope[0], parameter=slope[1])
    for name, value in params.named(after).items():
        if not torch.isfinite(value).all():
            was = params.constrained(flat_params, [name])[name]
            words = f"the step takes parameter {name!r} from {_extent(was)} to {_bad(value)} {where}"
            return NonFinite(f"{words}: use a smaller lr=", step, parameter=name)
    return NonFinite(f"the loss is not finite {where}: use a smaller lr= or look for overflow in the model", step)


def _of_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> tuple[str, str, str] | None:
    """The first site that is not finite: its name, what of it is so, and the values behind that."""
    for role, name, site in _sites(model_trace, guide_trace):
        for what, number in (("value", site["value"]), ("log density", site["log_prob"])):
            tensor = torch.as_tensor(number)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                place = _place(tensor)
                words = f"site {name!r} in the {role} has a {what} of {tensor[place].item()}"
                data = "in its data, " if site["is_observed"] and what == "value" else ""
                return name, words, f"{data}{f'first at {list(place)}, ' if place else ''}{_behind(site, tensor)}"
    return None


def _of_gradient(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, params: Params
) -> tuple[str, str, str, str] | None:
    """The first site with a gradient that is not finite: site and parameter, in words, and the values behind it."""
    named = [(name, leaf) for name, leaf in zip(params.names, params.leaves, strict=True) if leaf.requires_grad]
    for role, name, site in _sites(model_trace, guide_trace):
        term = torch.as_tensor(scale_and_mask(site["log_prob"], site["scale"], site["mask"])).sum()
        if not term.requires_grad or not named:
            continue
        grads = torch.autograd.grad(term, [leaf for _, leaf in named], retain_graph=True, allow_unused=True)
        for (parameter, leaf), grad in zip(named, grads, strict=True):
            if grad is None or torch.isfinite(grad).all():
                continue
            words = f"the gradient of site {name!r} in the {role} by parameter {parameter!r} is {_bad(grad)}"
            behind = f"the parameter, unconstrained, is {_extent(leaf.detach())}, {_behind(site, None)}"
            return name, parameter, words, behind
    return None


def _sites(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for role, trace in (("guide", guide_trace), ("model", model_trace)):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample":
                yield role, name, site


def _behind(site: dict[str, Any], bad: Tensor | None) -> str:
    """The value of a site and what its distribution was given, where ``bad`` is not finite or as ranges."""
    fn = base_distribution(site["fn"])
    given = {name: vars(fn)[name] for name in getattr(fn, "arg_constraints", {}) if name in vars(fn)}
    parts = {"value": site["value"], **given}
    known = [f"{name} {_beside(torch.as_tensor(part).detach(), bad)}" for name, part in parts.items()]
    return f"{type(fn).__name__} has {', '.join(known)}"


def _bad(tensor: Tensor) -> str:
    """The first number that is not finite, and where it is."""
    place = _place(tensor)
    return f"{tensor[place].item()}" + (f" at {list(place)}" if place else "")


def _place(tensor: Tensor) -> tuple[int, ...]:
    return tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())


def _beside(tensor: Tensor, bad: Tensor | None) -> str:
    """The numbers of ``tensor`` that belong to the first of ``bad`` that is not finite, in words."""
    if not torch.isfinite(tensor.double()).all():
        return _bad(tensor)
    if bad is not None and tensor.shape[: bad.dim()] == bad.shape:
        return _extent(tensor[_place(bad)])
    with suppress(RuntimeError):
        if bad is not None:
            return _extent(tensor.expand(bad.shape)[_place(bad)])
    return _extent(tensor)


def _extent(tensor: Tensor) -> str:
    least, most = tensor.double().aminmax() if tensor.numel() else (torch.nan, torch.nan)
    return f"{float(least):.4g}" if least == most else f"{float(least):.4g} to {float(most):.4g}"
