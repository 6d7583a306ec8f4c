"""Where a fit begins: what ``fit(..., init=)`` asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuide, AutoNormal
from torch import Tensor
from torch.distributions import biject_to

from inference.model.bound_model import BoundModel, name_of
from inference.model.log_joint import LogJoint
from inference.model.protocols import HasLocation, supports
from inference.optim.initialization.initial_normal import (
    DENSE,
    DRAWS,
    RISING,
    InitialNormal,
    NoInitialNormal,
    absolute_covariance,
    laplace,
    laplace_at,
    located,
    pathfinder,
    place_guide,
)
from inference.optim.initialization.mode_search import Iterate, ascend
from inference.utils.random_state import RandomStream

__all__ = ["InitStrategy", "as_init_strategy", "find_initial_normal", "initialize", "start_from"]

InitStrategy = str | Mapping[str, Any]
_WORDS = ("auto", "mode", "prior")
# What a model raises where it cannot compute, or not in double precision; errors of linear algebra are RuntimeErrors.
_NUMERICAL = (ArithmeticError, ValueError, RuntimeError, TypeError)
_MOST = 5000  # latents
_FEW = 50  # latents up to which a search from several starts is cheap
_ATTEMPTS = 20
_STEPS = (40, 60)  # up to that many, and above
_SAME = 0.01  # nats between the ends of two paths at one mode, at most
_GAP = 1.0  # nats between the Laplace approximation's evidence and its ELBO, above which other Normals are tried


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


def find_initial_normal(
    bound_model: BoundModel, args: tuple[Any, ...], stream: RandomStream, tries: int = 4
) -> InitialNormal | NoInitialNormal:
    """Search the mode of log p(x, z(u)) + log |dz/du| from the guide's own start, from 0 and draws of the prior.

    L-BFGS from ``tries`` of them (two above 50 latents), Newton's steps from the
    best end. Where that is no mode, as in a funnel, or Laplace's Normal has an
    ELBO more than a nat (and D/10) below its own evidence, the Normals of the
    iterates are compared by their ELBO.
    For AutoDelta, whose mode is that of log p(x, z), the second term is left out.

    Returns
    -------
    InitialNormal or NoInitialNormal
        The latter for guides that are no Normal or flow over all latents of
        one layout, for discrete latents, more than 5,000 latents, a model that
        is random given them, or a density that is finite at no start.

    References
    ----------
    Zhang, Carpenter, Gelman, Vehtari (2022), Pathfinder: parallel quasi-Newton variational inference.
    """
    return _guarded(bound_model, args, stream, partial(_search, tries=tries))


def start_from(
    bound_model: BoundModel, args: tuple[Any, ...], stream: RandomStream, u: Tensor
) -> InitialNormal | NoInitialNormal:
    """The Normal at ``u``, (D,), with the curvature that log p(x, z(u)) + log |dz/du| has there, (|H|)⁻¹."""
    return _guarded(bound_model, args, stream, partial(laplace_at, u=u))


def _guarded(
    bound_model: BoundModel,
    args: tuple[Any, ...],
    stream: RandomStream,
    look: Callable[[LogJoint], InitialNormal | NoInitialNormal],
) -> InitialNormal | NoInitialNormal:
    """Call ``look`` on the log joint, if it has a mode that can be searched; a numerical error is a reason too."""
    reason = _unfit(bound_model)
    if reason:
        return NoInitialNormal(reason)
    density = LogJoint(bound_model, args, stream, jacobian=not isinstance(bound_model.guide, AutoDelta))
    if density.size > _MOST:
        return NoInitialNormal(f"{density.size} latents are more than {_MOST}, and a search of their mode too dear")
    try:
        found = look(density)
    except _NUMERICAL as error:  # a user's model may fail where a fit would never have taken it
        found = NoInitialNormal(
            f"the search of the mode failed: {type(error).__name__}: {' '.join(str(error).split())}"
        )
    return replace(found, evaluations=density.evaluations)


def _unfit(bound_model: BoundModel) -> str:
    guide, latents = bound_model.guide, bound_model.latents
    discrete = [site.name for site in latents if site.support is not None and site.support.is_discrete]
    if discrete:
        return f"{discrete} are discrete: a mode has no curvature there"
    if bound_model.score_function_sites:
        return f"{list(bound_model.score_function_sites)} are not reparameterised"
    if not isinstance(guide, AutoContinuous | AutoDelta | AutoNormal):
        return f"{name_of(guide)} is no guide over a fixed vector of latents"
    if isinstance(guide, AutoContinuous) and not supports(guide, HasLocation):
        return f"{name_of(guide)} has no location that could be set"
    if {name for name, _ in guide.prototype_trace.iter_stochastic_nodes()} != {site.name for site in latents}:
        return f"{name_of(guide)} lays out other latents than the model has"
    return ""


def _search(density: LogJoint, tries: int) -> InitialNormal | NoInitialNormal:
    begins = _begins(density, tries if density.size <= _FEW else min(tries, 2))
    if not begins:
        return NoInitialNormal("log p(x, z) is finite at none of the starts")
    if density.value(begins[-1]) != density.value(begins[-1]):
        return NoInitialNormal("log p(x, z) is another number each time: the model draws numbers beside its latents")
    steps = _STEPS[density.size > _FEW]
    paths = [ascend(density, begin, absolute_covariance(density, begin), steps) for begin in begins]
    paths = [path for path in paths if path]
    if not paths:
        return NoInitialNormal("log p(x, z) has no finite gradient at any of the starts")
    noise, gap = density.noise(DRAWS), _GAP * max(1, density.size / 10)
    found = [laplace(density, end, noise) for end in _ends(paths)]
    best = max(found, key=lambda start: (start.is_mode, start.elbo))
    if density.size <= DENSE and not (best.is_mode and best.elbo > best.log_evidence - gap):
        other = max(pathfinder(density, paths, noise), key=lambda start: start.elbo, default=best)
        best = other if other.elbo > best.elbo + (gap if best.is_mode else 0) else best
    if not math.isfinite(best.elbo) and not best.is_mode:
        return NoInitialNormal("no Normal around the points of the search has a finite ELBO")
    return best


def _ends(paths: list[list[Iterate]]) -> list[Iterate]:
    """Where the paths ended, each height once; of those that still rise only the highest, if no other is there."""
    ends = sorted((path[-1] for path in paths), key=lambda end: -end.value)
    still = [end for end in ends if end.grad @ end.covariance(end.grad) <= RISING]
    kept: list[Iterate] = []
    for end in still or ends[:1]:
        if not kept or kept[-1].value - end.value > _SAME:
            kept.append(end)
    return kept


def _begins(density: LogJoint, tries: int) -> list[Tensor]:
    """Points at which the density is finite: the guide's own start, draws of the prior, and 0."""
    own = density.prototype()
    found: list[Tensor] = []
    for attempt in range(_ATTEMPTS * tries):
        if len(found) == tries or (found and attempt > 3 * tries):
            break
        u = own if attempt == 0 else torch.zeros_like(own) if attempt == 1 and tries > 2 else density.drawn()
        if torch.isfinite(u).all() and math.isfinite(density.value(u)) and not any(torch.equal(u, v) for v in found):
            found.append(u)
    return found
