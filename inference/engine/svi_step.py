"""One step of SVI as a graph: loss, gradient and the optimiser's update, recorded from one run of the model."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from inference.data.generated_dataset import GeneratedBatches
from inference.engine.svi_problem import SVIProblem
from inference.engine.tracing.batching_rules import NoRule, run_batched
from inference.engine.tracing.random_ops import RandomOp, pack
from inference.engine.tracing.traced_graph import GraphInput, InputKind, add_input, graph_inputs, input_of
from inference.engine.tracing.tracer import Substitution, Tracer, Untraceable
from inference.model.elbo import loss
from inference.optim.optimizers import Update
from inference.utils.random_state import RandomStream

__all__ = ["PARAMETERS", "RATES", "SVIStep", "batch_rows", "state_inputs", "step_rates", "trace_step"]

aten = torch.ops.aten
PARAMETERS, RATES = GraphInput(InputKind.PARAMETERS), GraphInput(InputKind.RATES)
_NOISE_BYTES = 2**25
_UNROLLED = 16  # particles that may be written out one by one
_MANY, _FEW = 32, 8  # particles from which, and numbers a particle up to which, they lie side by side


@dataclass(frozen=True)
class SVIStep:
    """θ, moments, rates, batches, noise, constants → loss, (2,), as a graph; θ and the moments change in place.

    ``groups`` are the positions in ``draws`` that share a noise input; each draw
    holds one number set for each of the particles where those are ``batched``,
    in the first dimension, or the ``last``. ``largest`` is the size of the
    largest tensor.
    """

    module: fx.GraphModule
    constants: list[Tensor]
    draws: list[RandomOp]
    randoms: list[int | None]
    groups: list[list[int]]
    batched: int | None
    largest: int
    last: bool = False

    def shape(self, draw: int) -> list[int]:
        """The shape of one draw in a step, particles included."""
        particles = [self.batched] if self.batched else []
        own = list(self.draws[draw].shape)
        return [*own, *particles] if self.last else [*particles, *own]

    def noise(self, steps: int) -> list[Tensor]:
        """Fresh random numbers for ``steps`` steps: for each group a tensor (steps, numbers a step)."""
        copies = self.batched or 1
        noise = []
        for group in self.groups:
            first, size = self.draws[group[0]], sum(self.draws[i].size for i in group) * copies
            if len(group) == 1:
                noise.append(first.many(steps * copies).reshape(steps, -1))
            else:
                whole = RandomOp(first.func, first.args, first.kwargs, (size,), first.dtype, first.device)
                noise.append(whole.many(steps))
        return noise

    def replayed(self, noise: Sequence[Tensor], row: int) -> list[list[Tensor | None]]:
        """What each particle's run of the model is to be answered at step ``row`` of ``noise``, in order."""
        values: dict[int, Tensor] = {}
        for group, numbers in zip(self.groups, noise, strict=True):
            sizes = [self.draws[i].size * (self.batched or 1) for i in group]
            for i, part in zip(group, numbers[row].split(sizes), strict=True):
                shaped = part.reshape(self.shape(i))
                values[i] = shaped.movedim(-1, 0) if self.last else shaped
        if self.batched is None:
            return [[None if i is None else values[i] for i in self.randoms]]
        return [[None if i is None else values[i][run] for i in self.randoms] for run in range(self.batched)]

    @property
    def noise_bytes(self) -> int:
        """Bytes of noise that one step uses."""
        return sum(d.size * d.dtype.itemsize for d in self.draws) * (self.batched or 1)

    @property
    def block(self) -> int:
        """Steps whose noise is drawn together, a divisor of 100; drawn whole, so that chunks do not change numbers."""
        most = _NOISE_BYTES // max(1, self.noise_bytes)
        return next(size for size in (100, 50, 25, 20, 10, 5, 4, 2, 1) if size <= max(most, 1))


def step_rates(problem: SVIProblem, update: Update, step: int) -> tuple[float, ...]:
    """The numbers that change from step to step: the optimiser's, then β where the target is annealed."""
    return (*update.hyperparameters(step), problem.anneal(step)) if problem.anneal else update.hyperparameters(step)


def state_inputs(update: Update) -> list[GraphInput]:
    """Return the inputs that a step changes in place: θ, then the optimiser's moments in their order."""
    return [PARAMETERS, *(GraphInput(InputKind.MOMENT, i) for i in range(len(update.moments)))]


def batch_rows(values: Iterable[Tensor]) -> dict[GraphInput, Tensor]:
    """Return the tensors of a batch, or of many batches, by their inputs."""
    return {GraphInput(InputKind.BATCH, i): value for i, value in enumerate(values)}


def trace_step(problem: SVIProblem, update: Update, stream: RandomStream, folds: bool = True) -> SVIStep:
    """Record one step; model and guide run once (once a particle where they cannot be batched).

    Without ``folds`` all constants are inputs, those of 0 and 1 too.

    Raises
    ------
    Untraceable
        With the reason, if what they do cannot be written down as a fixed graph.
    """
    bound_model = problem.bound_model
    if bound_model.score_function_sites:
        raise Untraceable(
            f"the guide's sites {list(bound_model.score_function_sites)} have no reparameterised gradient "
            "(Trace_ELBO's score-function "
            "terms need a baseline kept between steps)"
        )
    if isinstance(problem.data, GeneratedBatches) and not problem.data.by_torch:
        raise Untraceable("its fresh data are not drawn by torch's random numbers alone, which a graph could repeat")
    theta = problem.begin.to(bound_model.device)
    with bound_model.running(theta.clone(), RandomStream(dict(stream.state))):
        before = _other_randomness()
        recorder = _StepTracer(problem, update, theta, folds)
        step = recorder.batched(problem.particles) if problem.particles > 1 else recorder.plain(1)
        if _other_randomness() != before:
            raise Untraceable("it draws from NumPy's or Python's random numbers, which a graph would fix: use torch's")
        return step


class _StepTracer:
    def __init__(self, problem: SVIProblem, update: Update, theta: Tensor, folds: bool) -> None:
        self.problem = problem
        self.folds = folds
        self.bound_model = problem.bound_model
        self.update = update
        self.theta = theta.clone().requires_grad_(True)
        self.moments = update.init(theta)
        self.rates = torch.ones(len(step_rates(problem, update, 0)), dtype=theta.dtype, device=theta.device)

    def plain(self, particles: int) -> SVIStep:
        """Loss, gradient and update on one tape."""
        tape = Tracer(self._state(), self._parameter_at, folds=self.folds)
        with tape:
            value = _or_nan(self._loss(particles, tape), tape.failures)
            value = self._descend(value)
        return self._step(tape, value, None, tape.draws, tape.randoms)

    def batched(self, particles: int) -> SVIStep:
        """The loss of one particle on a tape, then many of it at once by vmap; one after the other where that fails."""
        single = Tracer(self._read(), self._parameter_at, folds=self.folds)
        with single:
            value = _or_nan(self._loss(1, single), single.failures)
        if not single.draws or _has_custom_gradient(value):
            return self._one_by_one(particles, "a gradient written in Python, or nothing drawn")
        forward = fx.GraphModule({}, _with_detached(single.finish(value)))
        if particles >= _MANY and all(draw.size <= _FEW for draw in single.draws):
            with suppress(NoRule):
                return self._side_by_side(single, forward, particles)
        try:
            return self._vectorised(single, forward, particles)
        except (RuntimeError, NotImplementedError) as error:  # an operator without a batching rule
            return self._one_by_one(particles, str(error))

    def _one_by_one(self, particles: int, reason: str) -> SVIStep:
        if particles > _UNROLLED:
            raise Untraceable(
                f"its {particles} particles cannot be run as one batch ({reason.splitlines()[0]}), and more than "
                f"{_UNROLLED} are too many to write out one by one"
            )
        return self.plain(particles)

    def _side_by_side(self, single: Tracer, forward: fx.GraphModule, particles: int) -> SVIStep:
        noise = {name: value.movedim(0, -1).contiguous() for name, value in _noise(single, particles).items()}
        tape = Tracer({**self._state(), **noise}, folds=self.folds)
        with tape:
            (value,) = run_batched(forward.graph, {**self._read(), **_fixed(single)}, noise)
            value = self._descend(value.mean(-1))
        return self._step(tape, value, particles, single.draws, single.randoms, last=True)

    def _vectorised(self, single: Tracer, forward: fx.GraphModule, particles: int) -> SVIStep:
        noise, fixed = _noise(single, particles), _fixed(single)
        order = graph_inputs(forward.graph)
        functional = torch.func.functionalize(forward)

        def one(draws: dict[GraphInput, Tensor]) -> Tensor:
            values = {**self._read(), **fixed, **draws}
            return torch.as_tensor(functional(*(values[name] for name in order))[0])

        tape = Tracer({**self._state(), **noise}, None, True, self.folds)  # vmap turns numbers into tensors
        with tape:
            value = torch.vmap(one, randomness="different")(noise).mean(0)
            value = self._descend(value)
        return self._step(tape, value, particles, single.draws, single.randoms)

    def _read(self) -> dict[GraphInput, Tensor]:
        """Return the inputs that the loss depends on."""
        return {PARAMETERS: self.theta, RATES: self.rates, **batch_rows(self.problem.batch_tensors)}

    def _state(self) -> dict[GraphInput, Tensor]:
        return {**self._read(), **dict(zip(state_inputs(self.update), [self.theta, *self.moments], strict=True))}

    def _loss(self, particles: int, tape: Tracer) -> Tensor:
        leaves = self.bound_model.params.leaves
        with Substitution(list(zip(leaves, self.bound_model.params.views(self.theta), strict=True)), tape):
            problem = self.problem
            beta = self.rates[-1] if problem.anneal else None
            return loss(problem.model, problem.guide, problem.args, particles, True, beta, problem.sticking_the_landing)

    def _descend(self, value: Tensor) -> Tensor:
        """Change θ in place by what the loss says; the loss, that of all processes together."""
        share, learns = self.problem.share, value.requires_grad
        grad = torch.autograd.grad(value[0], self.theta)[0] if learns else torch.zeros_like(self.theta)
        with torch.no_grad():
            if share is not None:
                grad, value = share.total(grad, value)
            if learns:
                self.update.update(self.theta, grad, self.moments, self.rates)
        return value

    def _parameter_at(self, value: Tensor) -> str | None:
        memory = value.untyped_storage().data_ptr()
        pairs = zip(self.bound_model.params.names, self.bound_model.params.leaves, strict=True)
        return next((name for name, leaf in pairs if leaf.untyped_storage().data_ptr() == memory), None)

    def _step(
        self,
        tape: Tracer,
        value: Tensor,
        batched: int | None,
        draws: list[RandomOp],
        randoms: list[int | None],
        last: bool = False,
    ) -> SVIStep:
        graph = tape.finish(value)
        step = SVIStep(
            fx.GraphModule({}, graph), tape.constants, draws, randoms, pack(draws), batched, tape.largest, last
        )
        _join_draws(graph, step)
        step.module.recompile()
        return step


def _noise(single: Tracer, particles: int) -> dict[GraphInput, Tensor]:
    return {GraphInput(InputKind.DRAW, i): draw.many(particles) for i, draw in enumerate(single.draws)}


def _fixed(single: Tracer) -> dict[GraphInput, Tensor]:
    return {GraphInput(InputKind.CONSTANT, i): value for i, value in enumerate(single.constants)}


def _other_randomness() -> tuple[Any, ...]:
    name, numbers, *rest = np.random.get_state()  # noqa: NPY002 - a model may use it
    return name, bytes(np.asarray(numbers)), *rest, random.getstate()


def _or_nan(value: Tensor, failures: list[Tensor]) -> Tensor:
    """The loss, or NaN where a matrix factorisation failed."""
    for code in failures:
        value = torch.where((code != 0).any(), torch.nan, value)
    return value


def _with_detached(graph: fx.Graph) -> fx.Graph:
    """Cut the gradient again where the model ran under ``torch.no_grad``."""
    for node in list(graph.nodes):
        if not node.meta.get("cut") or any(user.target is operator.getitem for user in node.users):
            continue
        with graph.inserting_after(node):
            cut = graph.call_function(aten.detach.default, (node,))
        node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
    return graph


def _has_custom_gradient(value: Tensor) -> bool:
    """Whether a gradient written in Python (a ``torch.autograd.Function``) lies behind ``value``.

    That of a registered operator does not count: the operator is in the graph.
    """
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind: type = type(node)
        registered = kind.__name__.startswith("GeneratedBackwardFor_")
        if issubclass(kind, torch.autograd.function.BackwardCFunction) and not registered:
            return True
        pending.extend(parent for parent, _ in node.next_functions)
    return False


def _join_draws(graph: fx.Graph, step: SVIStep) -> None:
    """Replace the inputs of the kind DRAW by one of the kind NOISE for each group, cut into pieces."""
    draws = {given.index: node for node in graph.nodes if (given := input_of(node)) and given.kind is InputKind.DRAW}
    first_operator = next(node for node in graph.nodes if node.op != "placeholder")
    for g, group in enumerate(step.groups):
        with graph.inserting_before(draws[group[0]]):
            noise = add_input(graph, GraphInput(InputKind.NOISE, g))
        start = 0
        for i in group:
            stop = start + step.draws[i].size * (step.batched or 1)
            with graph.inserting_before(first_operator):
                part = graph.call_function(aten.slice.Tensor, (noise, 0, start, stop))
                view = graph.call_function(aten.view.default, (part, step.shape(i)))
            draws[i].replace_all_uses_with(view)
            graph.erase_node(draws[i])
            start = stop
