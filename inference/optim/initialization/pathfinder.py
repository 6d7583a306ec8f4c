"""Where a fit begins: the mode of the log joint and the curvature there, or the best Normal on the way to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoNormal
from torch import Tensor

from inference.model.bound_model import BoundModel, name_of
from inference.model.log_joint import LogJoint
from inference.optim.initialization.mode_search import Iterate, absolute_inverse, ascend, climb
from inference.utils.random_state import RandomStream

__all__ = ["InitialNormal", "NoInitialNormal", "find_initial_normal", "start_again", "start_from"]

_MOST = 5000  # latents
_DENSE = 300  # latents with a full covariance
_FEW = 50  # latents up to which a search from several starts is cheap
_ATTEMPTS = 20
_STEPS = (40, 60)  # up to that many, and above
_NEWTON, _PRODUCTS = 12, 1500  # steps at most, and Hessian-vector products that they may cost
_RISING = 2.0  # nats that the next step would gain where a path ended: it is not near a mode
_PROBES, _DRAWS = 30, 30
_THINNED, _ROUGH, _FINE = 10, 5, 3  # iterates of a path that Pathfinder looks at, draws for each, and how many it keeps
_SAME = 0.01  # nats between the ends of two paths at one mode, at most
_FLAT = 1e-3  # nats that it would gain at a mode, where Newton's steps are not taken
_GAP = 1.0  # nats between the Laplace approximation's evidence and its ELBO, above which other Normals are tried


@dataclass(frozen=True)
class InitialNormal:
    """A Normal over the unconstrained latents u, in double precision, in the order in which the guide lays them out.

    ``loc`` is (D,); ``scale_tril``, (D, D), the Cholesky factor of its
    covariance, None above 300 latents; ``sd`` = 1/√(−H_ii), (D,), the spread of
    each latent given the others. ``log_joint`` is the log density at ``loc``
    and ``elbo`` the Normal's own, estimated from 30 draws, both in nats; −∞ where
    the density ends within its reach.
    ``is_mode`` says that ``loc`` is a mode and the Normal Laplace's; else it is
    an iterate of the search, Pathfinder's answer. ``evaluations`` counts
    densities, gradients and Hessian-vector products.
    """

    loc: Tensor
    scale_tril: Tensor | None
    sd: Tensor
    log_joint: float
    elbo: float
    is_mode: bool
    evaluations: int

    def draw(self, noise: Tensor) -> Tensor:
        """U from N(0, 1) ``noise``, both (…, D)."""
        spread = noise * self.sd if self.scale_tril is None else noise @ self.scale_tril.T
        return self.loc + spread


@dataclass(frozen=True)
class NoInitialNormal:
    """Why a guide has to keep its own start."""

    reason: str
    evaluations: int = 0


def start_again(saved: Mapping[str, Any], device: torch.device) -> InitialNormal | NoInitialNormal:
    """The start, or the lack of one, whose fields were ``saved``, with its tensors on ``device``."""
    moved: dict[str, Any] = {n: part.to(device) if isinstance(part, Tensor) else part for n, part in saved.items()}
    return NoInitialNormal(**moved) if "reason" in moved else InitialNormal(**moved)


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
    Start or NoStart
        The latter for guides that are no Normal or flow over all latents of
        one layout, for discrete latents, more than 5,000 latents, a model that
        is random given them, or a density that is finite at no start.

    References
    ----------
    Zhang, Carpenter, Gelman, Vehtari (2022), Pathfinder: parallel quasi-Newton variational inference.
    """
    return _looked(bound_model, args, stream, partial(_search, tries=tries))


def start_from(
    bound_model: BoundModel, args: tuple[Any, ...], stream: RandomStream, u: Tensor
) -> InitialNormal | NoInitialNormal:
    """The Normal at ``u``, (D,), with the curvature that log p(x, z(u)) + log |dz/du| has there, (|H|)⁻¹."""
    return _looked(bound_model, args, stream, partial(_here, u=u))


def _looked(
    bound_model: BoundModel,
    args: tuple[Any, ...],
    stream: RandomStream,
    look: Callable[[LogJoint], InitialNormal | NoInitialNormal],
) -> InitialNormal | NoInitialNormal:
    reason = _unfit(bound_model)
    if reason:
        return NoInitialNormal(reason)
    density = LogJoint(bound_model, args, stream, jacobian=not isinstance(bound_model.guide, AutoDelta))
    if density.size > _MOST:
        return NoInitialNormal(f"{density.size} latents are more than {_MOST}, and a search of their mode too dear")
    try:
        found = look(density)
    except Exception as error:  # a user's model may raise anything where a fit would never have taken it
        found = NoInitialNormal(
            f"the search of the mode failed: {type(error).__name__}: {' '.join(str(error).split())}"
        )
    return replace(found, evaluations=density.evaluations)


def _here(density: LogJoint, u: Tensor) -> InitialNormal | NoInitialNormal:
    value, grad = density.slope(u)
    if not (math.isfinite(value) and torch.isfinite(grad).all()):
        return NoInitialNormal("log p(x, z) or its gradient is not finite there")
    metric = _metric(density, u)
    is_mode = bool(grad @ (metric @ grad if metric.dim() == 2 else metric * grad) < _FLAT)
    return _scored(density, u, metric, density.noise(_DRAWS), is_mode, value)


def _unfit(bound_model: BoundModel) -> str:
    guide, latents = bound_model.guide, bound_model.latents
    discrete = [site.name for site in latents if site.support is not None and site.support.is_discrete]
    if discrete:
        return f"{discrete} are discrete: a mode has no curvature there"
    if bound_model.score_function_sites:
        return f"{list(bound_model.score_function_sites)} are not reparameterised"
    if not isinstance(guide, AutoContinuous | AutoDelta | AutoNormal):
        return f"{name_of(guide)} is no guide over a fixed vector of latents"
    if isinstance(guide, AutoContinuous) and not hasattr(guide, "loc"):
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
    paths = [ascend(density, begin, _metric(density, begin), steps) for begin in begins]
    paths = [path for path in paths if path]
    if not paths:
        return NoInitialNormal("log p(x, z) has no finite gradient at any of the starts")
    noise, gap = density.noise(_DRAWS), _GAP * max(1, density.size / 10)
    of_end = _diagonal if density.size > _DENSE else _laplace
    found = [of_end(density, end, noise) for end in _ends(paths)]
    best = max(found, key=lambda start: (start.is_mode, start.elbo))
    if density.size <= _DENSE and not (best.is_mode and best.elbo > _evidence(best) - gap):
        other = max(_pathfinder(density, paths, noise), key=lambda start: start.elbo, default=best)
        best = other if other.elbo > best.elbo + (gap if best.is_mode else 0) else best
    if not math.isfinite(best.elbo) and not best.is_mode:
        return NoInitialNormal("no Normal around the points of the search has a finite ELBO")
    return best


def _ends(paths: list[list[Iterate]]) -> list[Iterate]:
    """Where the paths ended, each height once; of those that still rise only the highest, if no other is there."""
    ends = sorted((path[-1] for path in paths), key=lambda end: -end.value)
    still = [end for end in ends if end.grad @ end.covariance(end.grad) <= _RISING]
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


def _metric(density: LogJoint, u: Tensor) -> Tensor:
    """|H|⁻¹ at ``u``, (D, D), or 1/|H_ii|, (D,), for more than 300 latents."""
    if density.size <= _DENSE:
        return absolute_inverse(torch.nan_to_num(density.hessian(u), 0.0, 0.0, 0.0))
    return _variances(density, u)


def _variances(density: LogJoint, u: Tensor) -> Tensor:
    """1/|H_ii|, (D,), estimated from random signs v as the mean of v ⊙ Hv (Bekas, Kokiopoulou, Saad 2007)."""
    signs = density.noise(_PROBES).sign()
    sizes = torch.nan_to_num((signs * density.products(u, signs)).mean(0).abs(), 0.0, 0.0, 0.0)
    known = sizes > 0
    return torch.where(known, sizes, sizes[known].median() if known.any() else torch.ones(())).reciprocal()


def _laplace(density: LogJoint, top: Iterate, noise: Tensor) -> InitialNormal:
    rising = top.grad @ top.covariance(top.grad) > _RISING
    end = climb(density, top.u, 0 if rising else min(_NEWTON, _PRODUCTS // density.size))
    covariance = absolute_inverse(torch.nan_to_num(end.hessian, 0.0, 0.0, 0.0), 1e-12 if end.is_mode else 1e-6)
    return _scored(density, end.u, covariance, noise, end.is_mode, end.value)


def _diagonal(density: LogJoint, top: Iterate, noise: Tensor) -> InitialNormal:
    is_mode = bool(top.grad @ top.covariance(top.grad) < _FLAT)
    return _scored(density, top.u, _variances(density, top.u), noise, is_mode, top.value)


def _pathfinder(density: LogJoint, paths: list[list[Iterate]], noise: Tensor) -> list[InitialNormal]:
    """Normals at the iterates with the best ELBO, by the covariance of L-BFGS, and at the best by |H|⁻¹ too."""
    points = [path[i * len(path) // _THINNED] for path in paths for i in range(min(_THINNED, len(path)))]
    eye = torch.eye(density.size, dtype=torch.float64, device=noise.device)
    rough = [(_scored(density, p.u, p.covariance(eye), noise[:_ROUGH], False, p.value), p) for p in points]
    rough.sort(key=lambda pair: -pair[0].elbo)
    finite = [pair for pair in rough[:_FINE] if math.isfinite(pair[0].elbo)]
    found = [(_scored(density, p.u, p.covariance(eye), noise, False, p.value), p) for _, p in finite]
    if found:
        point = max(found, key=lambda pair: pair[0].elbo)[1]
        found.append((_scored(density, point.u, _metric(density, point.u), noise, False, point.value), point))
    return [start for start, _ in found]


def _scored(
    density: LogJoint, loc: Tensor, covariance: Tensor, noise: Tensor, is_mode: bool, log_joint: float
) -> InitialNormal:
    """N(loc, covariance) with its ELBO, −∞ where the covariance has no Cholesky factor."""
    if covariance.dim() == 1:
        start = InitialNormal(loc, None, covariance.sqrt(), log_joint, -math.inf, is_mode, 0)
        log_det = start.sd.log().sum()
    else:
        sizes = covariance.diagonal().sqrt()
        tril, failed = torch.linalg.cholesky_ex(covariance / sizes[:, None] / sizes)
        tril = sizes[:, None] * tril
        if failed or not torch.isfinite(tril).all():
            return InitialNormal(loc, None, sizes, log_joint, -math.inf, False, 0)
        precision = torch.cholesky_inverse(tril)
        start = InitialNormal(loc, tril, precision.diagonal().rsqrt(), log_joint, -math.inf, is_mode, 0)
        log_det = tril.diagonal().log().sum()
    entropy = (noise.square().sum(-1) / 2).mean() + log_det + density.size / 2 * math.log(2 * math.pi)
    values = [density.value(u) for u in start.draw(noise)]
    return replace(start, elbo=sum(values) / len(values) + entropy.item())


def _evidence(start: InitialNormal) -> float:
    """log p(x) in nats, if the log joint were the quadratic that it is at its mode."""
    tril = start.scale_tril
    log_det = start.sd.log().sum() if tril is None else tril.diagonal().log().sum()
    return start.log_joint + log_det.item() + len(start.loc) / 2 * math.log(2 * math.pi)
