"""Where a fit begins: what ``fit(..., init=)`` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import biject_to

from inference.model.bound_model import BoundModel, name_of
from inference.optim.initialization.guide_placement import located, place_guide
from inference.optim.initialization.pathfinder import InitialNormal, NoInitialNormal, find_initial_normal, start_from
from inference.utils.random_state import RandomStream

__all__ = ["InitStrategy", "as_init_strategy", "initialize"]

InitStrategy = str | Mapping[str, Any]
_WORDS = ("auto", "mode", "prior")


def as_init_strategy(init: Any) -> InitStrategy:
    """``init``, if it is one that ``fit`` takes.

    Raises
    ------
    ValueError
        If it is not.
    """
    if isinstance(init, Mapping):
        wrong = [name for name in init if not isinstance(name, str)]
        if wrong:
            raise ValueError(f"init names {wrong[0]!r}, which is no latent site: give {{site: value}}")
        return init
    if isinstance(init, str) and init in _WORDS:
        return init
    raise ValueError(f"init is {init!r}: pass 'auto', 'mode', 'prior' or {{site: value}}")


def initialize(
    bound_model: BoundModel, args: tuple[Any, ...], stream: RandomStream, init: InitStrategy, search: bool
) -> InitialNormal | NoInitialNormal:
    """Put the guide of ``bound_model`` where ``init`` says; and the start, where its curvature is known.

    ``search`` says that the steps will be found too, for which the curvature is
    wanted: ``"auto"`` means the guide's own start without it. A start that was
    only searched is left to the caller to apply.

    Raises
    ------
    ValueError
        If the guide cannot be put there, there is no mode where one is asked
        for, or a site, shape or value of a mapping is unfit; the message names it.
    """
    if isinstance(init, Mapping):
        u = _unconstrained(bound_model, init)
        bound_model.params.hold(located(bound_model, u))
        return (
            _required(start_from(bound_model, args, stream, u), "init={site: value}")
            if search
            else NoInitialNormal("given")
        )
    if init == "prior" or not (search or init == "mode"):
        return NoInitialNormal("the guide's own start was asked for")
    found = find_initial_normal(bound_model, args, stream)
    if init == "mode":
        found = _required(found, "init='mode'")
        if not found.is_mode:
            raise ValueError(
                "init='mode', but the search ended at no mode (a density without an upper bound has none, as a "
                "funnel's): pass init='auto', which starts from the best Normal on the way, or re-parameterise"
            )
        bound_model.params.hold(place_guide(bound_model, found))
    return found


def _required(found: InitialNormal | NoInitialNormal, asked: str) -> InitialNormal:
    if isinstance(found, InitialNormal):
        return found
    raise ValueError(f"{asked} cannot be done: {found.reason}; leave init out")


def _unconstrained(bound_model: BoundModel, values: Mapping[str, Any]) -> Tensor:
    """U, (D,), of values in the model's own space; the sites left out stay where the guide starts them."""
    guide = bound_model.guide
    if not isinstance(guide, AutoGuide):
        raise ValueError(f"init={{site: value}} needs one of Pyro's autoguides, but {name_of(guide)} is none")
    nodes = dict(guide.prototype_trace.iter_stochastic_nodes())
    unknown = [name for name in values if name not in nodes]
    if unknown:
        raise ValueError(f"init names {unknown[0]!r}, which is no latent site: name some of {list(nodes)}")
    parts = []
    for name, node in nodes.items():
        value = _checked(name, values[name], node) if name in values else node["value"].detach().double()
        parts.append(biject_to(node["fn"].support).inv(value).reshape(-1))
    return torch.cat(parts)


def _checked(name: str, given: Any, node: dict[str, Any]) -> Tensor:
    shape, support = node["value"].shape, node["fn"].support
    try:
        value = torch.as_tensor(given, dtype=torch.float64, device=node["value"].device).detach()
        value = value.expand(shape).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"init of {name!r} is {given!r}: give numbers of shape {tuple(shape)}") from error
    if not torch.isfinite(value).all() or not support.check(value).all():
        raise ValueError(f"init of {name!r} is {given!r}, outside of its support {support}: give values inside")
    return value
