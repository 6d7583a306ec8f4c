"""Check of the gradient that a fit follows against the slope of its loss: autograd beside central differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference.data.arguments import argument_names, as_tensors
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel, device_for
from inference.model.elbo import Model, loss, traces
from inference.model.log_joint import InDouble
from inference.utils.random_state import RandomStream
from inference.utils.validation import positive_integer, positive_number, seed_number

__all__ = ["GradientCheck", "GradientEntry", "check_gradients"]

_FIRST = 1e-5
# Where the first step disagrees: long ones for a loss whose rounding hides the slope, short ones beside a kink.
_AGAIN = ((1e-3, True), (1e-4, True), (1e-6, False), (1e-7, False))
_JITTER = 0.1
_SMALL = 1e-3  # of the largest slope: errors of smaller ones are relative to this
_ROUNDING = 1e-6  # of the loss, likewise
_IMPLICIT = (dist.Gamma, dist.Beta, dist.Dirichlet, dist.StudentT)


@dataclass(frozen=True)
class GradientEntry:
    """One scalar of a parameter: its slope by ``autograd`` and by ``difference``, in nats a unit of θ.

    ``error`` is |autograd − difference| over the larger of the two, or over a
    thousandth of the steepest slope of all where both are smaller.
    """

    name: str
    index: tuple[int, ...]
    autograd: float
    difference: float
    error: float


@dataclass(frozen=True)
class GradientCheck:
    """Result of :func:`check_gradients`.

    ``parameters`` holds the worst entry of each parameter, ``worst`` the worst
    of all; ``detached`` names those that the loss depends on but that get no
    gradient. ``checked`` of ``size`` scalars were looked at.
    """

    parameters: Mapping[str, GradientEntry]
    detached: tuple[str, ...]
    tolerance: float
    checked: int
    size: int

    @property
    def worst(self) -> GradientEntry:
        """The entry with the largest error."""
        return max(self.parameters.values(), key=lambda entry: entry.error)

    @property
    def errors(self) -> dict[str, float]:
        """The largest error of each parameter, by name."""
        return {name: entry.error for name, entry in self.parameters.items()}

    @property
    def failed(self) -> tuple[str, ...]:
        """The parameters with an error above the tolerance."""
        return tuple(name for name, error in self.errors.items() if not error <= self.tolerance)

    @property
    def passed(self) -> bool:
        """True if no error is above the tolerance."""
        return not self.failed

    @property
    def reasons(self) -> tuple[str, ...]:
        """The fault of each parameter that failed, in words."""
        return tuple(self._reason(self.parameters[name]) for name in self.failed)

    def _reason(self, entry: GradientEntry) -> str:
        where = f"{entry.name}{list(entry.index) if entry.index else ''}"
        if entry.name in self.detached:
            return f"{where} gets no gradient, but the loss changes by {entry.difference:.6g} a unit: it is detached"
        opposite = abs(entry.autograd + entry.difference) < 0.01 * abs(entry.difference)
        return f"{where}: {entry.autograd:.6g} by autograd, {entry.difference:.6g} by differences" + (
            ", the opposite sign" if opposite else ""
        )


def check_gradients(
    model: Model,
    guide: Model,
    *data: Any,
    particles: int = 1,
    batch_size: int | None = None,
    at: Mapping[str, Any] | None = None,
    most: int = 1000,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> GradientCheck:
    """Compare the gradient of −ELBO by autograd with central differences, for each number in θ.

    dᵢ = [ℓ(θ + h eᵢ; ε) − ℓ(θ − h eᵢ; ε)] / 2h with ε, the random numbers of
    guide and mini-batch, the same at both ends, in double precision. ℓ is the
    loss that ``fit`` descends; θ are the unconstrained parameters of guide and
    model. h is 10⁻⁵ max(1, |θᵢ|); an entry that disagrees is tried again with
    longer steps (extrapolated after Richardson) and with shorter ones, which
    step over no kink of a ReLU unless it is right at θ.

    Parameters
    ----------
    model, guide, data
        As for :func:`~inference.fit`; they are left as they were, as are
        Pyro's parameter store and the random state of the process.
    particles, batch_size
        As for :func:`~inference.fit`.
    at
        Where: values by name, as ``posterior.params``. If left out, the start
        of a fit, moved by N(0, 0.1²), since many slopes are zero at a start.
    most
        The most numbers to look at; of more parameters, a random choice that
        takes as many from each.
    tolerance
        The largest error to pass.
    seed
        Of the start, of ε and of the choice.

    Raises
    ------
    ValueError
        If the guide has sites whose gradient is no derivative along the draw:
        discrete ones, which need the score function, and Gamma, Beta,
        Dirichlet and Student t, drawn by rejection; if there are no parameters,
        ``at`` has other names, or the loss is not finite.

    References
    ----------
    Griewank, Walther (2008), Evaluating derivatives, chapter 1 (differences beside derivatives).
    Glasserman (2003), Monte Carlo methods in financial engineering, section 7.1 (common random numbers).

    Examples
    --------
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(-1, 1, 30).reshape(-1, 1)
    >>> check = check_gradients(linear_regression, mean_field_normal(linear_regression), x, 2 * x[:, 0])
    >>> check.passed, check.checked, check.worst.error < 1e-6
    (True, 6, True)
    """
    positive_integer(most, "most")
    limit = positive_number(tolerance, "tolerance")
    names = argument_names(model, len(data))
    where = device_for("auto", model, guide)
    stream = RandomStream.seeded(seed_number(seed))
    modules = [function for function in (model, guide) if isinstance(function, nn.Module)]
    kinds = [p.dtype for module in modules for p in module.parameters() if p.is_floating_point()]
    kind = kinds[0] if kinds else torch.get_default_dtype()  # that of the networks of model and guide
    size = None if batch_size is None else positive_integer(batch_size, "batch_size")
    args = as_tensors(data, names, where, kind)
    bound_model = BoundModel.start(model, guide, args, stream, where, kind, batch_size=size)
    problem = SVIProblem.on(bound_model, InMemory(args, size), particles=positive_integer(particles, "particles"))
    problem = replace(
        problem,
        bound_model=replace(bound_model, dtype=torch.float64),
        data=InMemory(as_tensors(data, names, where, torch.float64), size),
    )
    flat_params = _starting_point(problem.bound_model, at, stream)
    _refuse_other_gradients(problem, flat_params, stream)
    return _compare(_Slopes(problem, seed), flat_params, most, limit)


@dataclass(frozen=True)
class _Slopes:
    """The loss as a function of θ alone: every call draws the same random numbers."""

    problem: SVIProblem
    seed: int

    def loss(self, flat_params: Tensor, grad: Tensor | None = None) -> float:
        """ℓ(θ; ε), its gradient written to ``grad`` where one is given."""
        problem = self.problem
        with torch.enable_grad(), problem.bound_model.running(flat_params, RandomStream.seeded(self.seed, 1), grad):
            with InDouble():
                value = loss(problem.model, problem.guide, problem.args, problem.particles, reparameterized=True)[0]
            if grad is not None and value.requires_grad:
                value.backward()
        return value.item()

    def difference(self, flat_params: Tensor, i: int, step: float, extrapolate: bool) -> float:
        """dᵢ with h = step · max(1, |θᵢ|), or (4 dᵢ(h) − dᵢ(2h)) / 3."""
        h = step * max(1.0, abs(flat_params[i].item()))
        near = self._central(flat_params, i, h)
        return (4 * near - self._central(flat_params, i, 2 * h)) / 3 if extrapolate else near

    def _central(self, flat_params: Tensor, i: int, h: float) -> float:
        above, below = flat_params.clone(), flat_params.clone()
        above[i] += h
        below[i] -= h
        return (self.loss(above) - self.loss(below)) / (above[i] - below[i]).item()


def _compare(slopes: _Slopes, flat_params: Tensor, most: int, tolerance: float) -> GradientCheck:
    params = slopes.problem.bound_model.params
    grad = torch.zeros_like(flat_params)
    value = slopes.loss(flat_params, grad)
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value} where the gradient was to be checked: pass at= with other parameters")
    places = [(name, tuple(i)) for name, leaf in params.named(flat_params).items() for i in np.ndindex(*leaf.shape)]
    # At most ``most`` positions in the flat vector, as many of each parameter as can be.
    generator = torch.Generator().manual_seed(slopes.seed)
    ranks = torch.cat([torch.randperm(leaf.numel(), generator=generator) for leaf in params.leaves])
    chosen: list[int] = sorted(ranks.argsort(stable=True)[:most].tolist())
    first = {i: slopes.difference(flat_params, i, _FIRST, False) for i in chosen}
    steepest = max(grad.abs().max().item(), *(abs(d) for d in first.values()))
    floor = max(_SMALL * steepest, _ROUNDING * abs(value), _ROUNDING)
    worst: dict[str, GradientEntry] = {}
    for i, d in first.items():
        entry = _entry(*places[i], grad[i].item(), d, floor)
        for step in _AGAIN:
            if entry.error > tolerance:
                other = _entry(*places[i], grad[i].item(), slopes.difference(flat_params, i, *step), floor)
                entry = min(entry, other, key=lambda e: e.error)
        worst[entry.name] = max(entry, worst.get(entry.name, entry), key=lambda e: e.error)
    silent = {name for name, view in params.named(grad).items() if not view.any()}
    detached = tuple(name for name, entry in worst.items() if name in silent and entry.error > tolerance)
    return GradientCheck(worst, detached, tolerance, len(chosen), len(flat_params))


def _entry(name: str, index: tuple[int, ...], g: float, d: float, floor: float) -> GradientEntry:
    error = abs(g - d) / max(abs(g), abs(d), floor)
    return GradientEntry(name, index, g, d, error if math.isfinite(error) else math.inf)


def _starting_point(bound_model: BoundModel, at: Mapping[str, Any] | None, stream: RandomStream) -> Tensor:
    """Return θ at which to compare, shape (P,)."""
    params = bound_model.params
    if not params.size:
        raise ValueError("neither model nor guide has a parameter: there is no gradient to check")
    if at is None:
        start = params.flatten().double()
        with stream.active():
            return start + _JITTER * torch.randn(len(start), dtype=torch.float64).to(start.device)
    if at.keys() != set(params.names):
        raise ValueError(f"at has {sorted(at)}, the parameters are {sorted(params.names)}: give each, in its own space")
    return params.unconstrained({n: torch.as_tensor(v, device=bound_model.device).double() for n, v in at.items()})


def _refuse_other_gradients(problem: SVIProblem, flat_params: Tensor, stream: RandomStream) -> None:
    if problem.bound_model.score_function_sites:
        raise ValueError(
            f"the guide draws {list(problem.bound_model.score_function_sites)} without reparameterisation: their "
            "gradient is a "
            "score-function estimate, right on average, which is not the slope of the loss at fixed random numbers"
        )
    with torch.enable_grad(), problem.bound_model.running(flat_params, stream), InDouble():
        _, guide_trace = traces(problem.model, problem.guide, problem.args)
    for name, site in guide_trace.nodes.items():
        fn = site.get("fn")
        while fn is not None and hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, _IMPLICIT) and any(getattr(fn, p).requires_grad for p in fn.arg_constraints):
            raise ValueError(
                f"the guide draws {name!r} from {type(fn).__name__} by rejection, and its gradient is an implicit one, "
                "which is not the slope of the loss at fixed random numbers"
            )
