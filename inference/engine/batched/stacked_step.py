"""One step of many fits as one graph.

Each fit's step was traced for itself. Where the traced graphs have the same
form they become one graph of C fits: a tensor that all fits share stays single,
and a tensor that differs gets one dimension more, along which the fits lie.
The work is done in three passes over the graph:

1. :func:`_with_number_inputs` turns the numbers in operators that differ from
   fit to fit into inputs;
2. :func:`_pure` traces the step once more with its writes to memory removed,
   as neither the batching rules nor :func:`torch.vmap` can write to a batch;
3. :func:`_traced_for` runs that graph on C copies of every input and traces
   what happens, with the new state written back at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from inference.engine.svi_step import PARAMETERS, SVIStep
from inference.engine.tracing.batching_rules import NoRule, run_batched
from inference.engine.tracing.random_ops import is_random
from inference.engine.tracing.traced_graph import GraphInput, InputKind, add_input, graph_inputs, input_of
from inference.engine.tracing.tracer import Tracer, Untraceable

__all__ = ["BatchedStep", "TracedFit", "stack"]

aten = torch.ops.aten
_SMALL = 2**11  # numbers in the largest tensor of a fit, up to which vectors run along the fits


@dataclass(frozen=True)
class TracedFit:
    """The step of one fit, traced without folding, and the constants that are this fit's in it.

    ``form`` is what fits must share to be steps of one graph, ``numbers`` are those
    that stand in its operators, in order. ``borrowed`` says that the step was
    traced for another fit, with other data or from another start, and may not be this one's.
    """

    step: SVIStep
    constants: Sequence[Tensor]
    form: tuple[Any, ...]
    numbers: list[float]
    borrowed: bool = False

    @classmethod
    def of(cls, step: SVIStep) -> TracedFit:
        """Describe a step that was traced for the fit itself."""
        text, numbers = _outline(step.module.graph)
        draws = tuple((str(d.func), d.shape, d.dtype, str(d.kwargs)) for d in step.draws)
        kinds = tuple((tuple(c.shape), c.dtype) for c in step.constants)
        form = (text, draws, kinds, tuple(map(tuple, step.groups)), step.batched, step.last)
        return cls(step, step.constants, form, numbers)


@dataclass(frozen=True)
class BatchedStep:
    """θ, moments, rates and noise of C fits, and constants → their losses, as a graph; θ and moments change in place.

    ``last`` says that the fits are the last dimension of each of those, not the
    first. ``own`` are constants of each fit, (fits, …) for all fits,
    of which a graph of C takes any C; ``shared`` are the others.
    """

    module: fx.GraphModule
    state: tuple[GraphInput, ...]
    shared: Mapping[GraphInput, Tensor]
    own: Mapping[GraphInput, Tensor]
    largest: int
    last: bool


def stack(
    recordings: Sequence[TracedFit], inputs: Mapping[GraphInput, Tensor], state: Sequence[GraphInput], fits: int
) -> BatchedStep:
    """Return the step of ``fits`` fits at once, given the traces of all fits, which are of one form.

    ``inputs`` are those of one fit, the constants aside: θ, the moments, rates,
    and noise; of these ``state`` change.

    Raises
    ------
    Untraceable
        If an operator cannot be run for many fits at once.
    """
    first = recordings[0].step
    for node in first.module.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "tags") and is_random(node.target):
            raise Untraceable(f"it draws with parameters that are learned ({node.target}), one fit after the other")
    own, shared = _constants(recordings)
    graph, numbers = _with_number_inputs(recordings)
    own |= {name: inputs[PARAMETERS].new_tensor(values) for name, values in numbers.items()}
    many = {**inputs, **{name: value[0] for name, value in own.items()}}
    pure, made = _pure(graph, {**many, **shared}, state, len(first.constants))
    tape, module, last = _traced_for(fits, pure, many, shared | made, state, first.largest <= _SMALL)
    fixed = {GraphInput(InputKind.CONSTANT, i): value for i, value in enumerate(tape.constants)}
    whole = {_as_own(name): value for name, value in own.items()}
    return BatchedStep(module, tuple(state), fixed, whole, tape.largest, last)


def _constants(recordings: Sequence[TracedFit]) -> tuple[dict[GraphInput, Tensor], dict[GraphInput, Tensor]]:
    """Return the constants that differ from fit to fit, stacked, and those that all fits share."""
    own, shared = {}, {}
    for i, values in enumerate(zip(*(one.constants for one in recordings), strict=True)):
        name, first = GraphInput(InputKind.CONSTANT, i), values[0]
        if all(value is first for value in values) or all(torch.equal(value, first) for value in values[1:]):
            shared[name] = first
        else:
            own[name] = torch.stack(values)
    return own, shared


def _as_own(name: GraphInput) -> GraphInput:
    """Return the input of the batched graph that holds, for each fit, what ``name`` is in the graph of one."""
    return replace(name, kind=InputKind.OWN_CONSTANT) if name.kind is InputKind.CONSTANT else name


# Pass 1: numbers in operators


def _outline(graph: fx.Graph) -> tuple[str, list[float]]:
    """Return the graph as text without names and floating-point numbers, and those numbers in order.

    Fits that differ in a learning rate or a prior's scale have the same text, and so can share a graph. Integers
    stay in the text: they are sizes and dimensions, which decide on shapes.
    """
    places, numbers = {node: f"%{i}" for i, node in enumerate(graph.nodes)}, []

    def described(value: Any) -> Any:
        if isinstance(value, float):
            numbers.append(value)
            return "a float"
        return places.get(value, value) if isinstance(value, fx.Node) else value

    lines = []
    for node in graph.nodes:
        args = fx.node.map_aggregate((node.args, node.kwargs), described)
        lines.append(f"{places[node]} {node.op} {node.target} {args}")
    return "\n".join(lines), numbers


def _with_number_inputs(recordings: Sequence[TracedFit]) -> tuple[fx.Graph, dict[GraphInput, list[float]]]:
    """Copy the graph of the first fit, with an input for each number that differs, and return their values by fit."""
    # Most fits of one form come from one trace, whose numbers are then the same.
    alike = len({id(one.step) for one in recordings}) == 1
    columns = list(zip(*(one.numbers for one in (recordings[:1] if alike else recordings)), strict=True))
    differ = {i for i, column in enumerate(columns) if any(value != column[0] for value in column[1:])}
    twin = fx.Graph()
    twin.output(twin.graph_copy(recordings[0].step.module.graph, {}))
    found: dict[GraphInput, list[float]] = {}
    place = 0  # among all numbers, in the order of _outline
    for node in list(twin.nodes):
        first = next(iter(twin.nodes))
        seen: list[float] = []

        def replaced(value: Any, first: fx.Node = first, seen: list[float] = seen, place: int = place) -> Any:
            if not isinstance(value, float):
                return value
            seen.append(value)
            number = place + len(seen) - 1
            if number not in differ:
                return value
            name = GraphInput(InputKind.NUMBER, number)
            found[name] = list(columns[number])
            with twin.inserting_before(first):
                return add_input(twin, name)

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replaced)
        if any(number in differ for number in range(place, place + len(seen))):
            _take_tensors(node, args, kwargs)
        place += len(seen)
    return twin, found


def _take_tensors(node: fx.Node, args: Any, kwargs: Any) -> None:
    """Give an operator arguments in which tensors stand for numbers, by the overload that takes tensors."""
    target: Any = node.target
    if target is aten.full.default:  # which has no such overload
        node.target, node.args, node.kwargs = aten.expand.default, (args[1], args[0]), {}
    else:
        node.target, node.args, node.kwargs = target.overloadpacket, args, kwargs


# Pass 2: a graph that writes to nothing


def _pure(
    graph: fx.Graph, examples: Mapping[GraphInput, Tensor], state: Sequence[GraphInput], constants: int
) -> tuple[fx.GraphModule, dict[GraphInput, Tensor]]:
    """Return a graph that writes to nothing and has loss and new state as outputs, and its further constants.

    ``functionalize`` turns each write into a new value, and at the end copies the last of these values back. Those
    final copies are removed, as the new state is an output. The second trace makes constants of its own, which
    are numbered after the ``constants`` of the first.
    """
    module, names = fx.GraphModule({}, graph), graph_inputs(graph)
    given = [examples[name].clone() for name in names]

    def stepped(*values: Tensor) -> tuple[Tensor, ...]:
        loss = module(*values)[0]
        return loss, *(values[names.index(name)] for name in state)

    tape = Tracer(dict(zip(names, given, strict=True)))
    try:
        with tape, torch.no_grad():
            outputs = torch.func.functionalize(stepped)(*given)
    except (RuntimeError, TypeError) as error:
        raise Untraceable(f"a number that differs from fit to fit has no tensor's form ({error})") from error
    found = tape.finish(*outputs)
    _remove_writes(found)
    made = {GraphInput(InputKind.CONSTANT, constants + i): value for i, value in enumerate(tape.constants)}
    placeholders = [node for node in found.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders[len(names) :], made, strict=True):
        node.target, node.meta["input"] = str(name), name
    return fx.GraphModule({}, found), made


def _remove_writes(graph: fx.Graph) -> None:
    """Remove the final copies into the inputs; raise :class:`Untraceable` if another operator writes to memory."""
    for node in list(graph.nodes):
        if node.target is aten.copy_.default:
            if input_of(node.args[0]) is None or node.users:
                raise Untraceable("it writes to memory in a way that many fits cannot")
            graph.erase_node(node)
        elif node.op == "call_function" and hasattr(node.target, "_schema") and node.target._schema.is_mutable:
            raise Untraceable(f"it writes to memory by {node.target}, which many fits cannot")
    graph.eliminate_dead_code()


# Pass 3: many fits


def _traced_for(
    fits: int,
    pure: fx.GraphModule,
    one: Mapping[GraphInput, Tensor],
    shared: Mapping[GraphInput, Tensor],
    state: Sequence[GraphInput],
    small: bool,
) -> tuple[Tracer, fx.GraphModule, bool]:
    """Trace the pure graph for ``fits`` copies of ``one``; the flag says that the fits are the last dimension.

    A ``small`` fit would fill a part of the processor's vectors only, so its fits go last, and vectors run along
    them. The rules for that know fewer operators than vmap, which puts the fits first.
    """

    def copies(dim: int) -> dict[GraphInput, Tensor]:
        return {name: torch.stack([value] * fits, dim) for name, value in one.items()}

    if small:
        with suppress(NoRule):
            return *_trace(pure, copies(-1), shared, state, last=True), True
    try:
        return *_trace(pure, copies(0), shared, state, last=False), False
    except (RuntimeError, NotImplementedError, TypeError, UserWarning) as error:
        problem = str(error).splitlines()[0]
        raise Untraceable(f"an operator cannot be run for many fits at once ({problem})") from error


def _trace(
    pure: fx.GraphModule,
    many: dict[GraphInput, Tensor],
    shared: Mapping[GraphInput, Tensor],
    state: Sequence[GraphInput],
    last: bool,
) -> tuple[Tracer, fx.GraphModule]:
    tape = Tracer({_as_own(name): value for name, value in many.items()})
    with tape, torch.no_grad():
        # The tracer folds zeros and ones into the graph if they were made while it records, so they are copied here.
        whole = {name: value.clone() if _is_folded(value) else value for name, value in shared.items()}
        if last:
            loss, *after = run_batched(pure.graph, whole, many, long_products=True)
        else:
            loss, *after = _by_vmap(pure, many, whole)
        for name, value in zip(state, after, strict=True):
            many[name].copy_(value)
    return tape, fx.GraphModule({}, tape.finish(loss))


def _is_folded(value: Tensor) -> bool:
    """Return True for a tensor of zeros or of ones alone, which makes operators vanish."""
    if value.numel() == 0 or value.numel() > 4096 or not value.is_floating_point():
        return False
    first = value.reshape(-1)[0].item()
    return first in (0.0, 1.0) and bool((value == first).all())


def _by_vmap(pure: fx.GraphModule, many: dict[GraphInput, Tensor], whole: dict[GraphInput, Tensor]) -> Any:
    graph = fx.Graph()
    graph.output(graph.graph_copy(pure.graph, {}))
    for node in graph.nodes:
        if node.target is aten.copy.default:  # which has no batching rule in torch
            node.target = lambda to, value: value.expand_as(to).to(to.dtype)
    module, names = fx.GraphModule({}, graph), graph_inputs(graph)

    def one(own: dict[GraphInput, Tensor]) -> Any:
        values = {**whole, **own}
        return module(*(values[name] for name in names))

    with warnings.catch_warnings():
        # torch warns where it would loop over the fits, which is slower than to run them one by one.
        warnings.filterwarnings("error", message="There is a performance drop")
        return torch.vmap(one)(many)
