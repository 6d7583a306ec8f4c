"""One step of many fits as one graph: what they share stays single, what differs has the fits in a dimension more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from inference.engine.svi_step import SVIStep
from inference.engine.tracing.batching_rules import NoRule, run_batched
from inference.engine.tracing.random_ops import is_random
from inference.engine.tracing.tracer import Tracer, Untraceable

__all__ = ["BatchedStep", "TracedFit", "stack"]

aten = torch.ops.aten
_OWN = "own_"  # before the name of an input that is a constant of each fit
_SMALL = 2**11  # numbers in the largest tensor of a fit, up to which vectors run along the fits


@dataclass(frozen=True)
class TracedFit:
    """The step of one fit, recorded without folding, and the constants that are this fit's in it.

    ``form`` is what fits must share to be steps of one graph, ``numbers`` are those
    that stand in its operators, in order. ``borrowed`` says that the step was
    recorded of another fit, with other data or from another start, and may not be this one's.
    """

    step: SVIStep
    constants: Sequence[Tensor]
    form: tuple[Any, ...]
    numbers: list[float]
    borrowed: bool = False

    @classmethod
    def of(cls, step: SVIStep) -> TracedFit:
        """What was recorded of a fit itself."""
        text, numbers = _outline(step.module.graph)
        draws = tuple((str(d.func), d.shape, d.dtype, str(d.kwargs)) for d in step.draws)
        kinds = tuple((tuple(c.shape), c.dtype) for c in step.constants)
        form = (text, draws, kinds, tuple(map(tuple, step.groups)), step.batched, step.last)
        return cls(step, step.constants, form, numbers)


@dataclass(frozen=True)
class BatchedStep:
    """θ, moments, rates and noise of C fits, and constants → their losses, as a graph; θ and moments change in place.

    ``last`` says that the fits are the last dimension of each of those, not the
    first. ``own`` are constants of each fit by name, (fits, …) for all that there
    are, of which a graph of C takes any C; ``shared`` are the others.
    """

    module: fx.GraphModule
    state: tuple[str, ...]
    shared: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    largest: int
    last: bool


def stack(
    recordings: Sequence[TracedFit], inputs: Mapping[str, Tensor], state: Sequence[str], fits: int
) -> BatchedStep:
    """The step of ``fits`` at once of the fits that were recorded, which are of one form.

    ``inputs`` are those of one fit by name, the constants aside: ``theta``, the
    moments, ``rates``, ``noise0``, …; of these ``state`` change.

    Raises
    ------
    Untraceable
        If an operator cannot be run for many fits at once.
    """
    first = recordings[0]
    for node in first.step.module.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "tags") and is_random(node.target):
            raise Untraceable(f"it draws with parameters that are learned ({node.target}), one fit after the other")
    own, shared = _constants(recordings)
    distinct = {id(one.step): one.numbers for one in recordings}
    alike = len(distinct) == 1
    graph, numbers = _with_inputs(
        first.step.module.graph, [first.numbers] if alike else [one.numbers for one in recordings]
    )
    dtype = inputs["theta"].dtype
    own |= {name: torch.tensor(values, dtype=dtype, device=inputs["theta"].device) for name, values in numbers.items()}
    examples = {**inputs, **shared, **{name: value[0] for name, value in own.items()}}
    pure, made = _pure(graph, examples, state)
    shared |= made
    many = {**inputs, **{name: value[0] for name, value in own.items()}}
    stacked = None
    if first.step.largest <= _SMALL:
        with suppress(NoRule):
            stacked = _recorded(pure, _copies(many, fits, -1), shared, state, last=True)
    last = stacked is not None
    try:
        tape, module = stacked or _recorded(pure, _copies(many, fits, 0), shared, state, last=False)
    except (RuntimeError, NotImplementedError, TypeError, UserWarning) as error:
        problem = str(error).splitlines()[0]
        raise Untraceable(f"an operator cannot be run for many fits at once ({problem})") from error
    fixed = {f"constant{i}": value for i, value in enumerate(tape.constants)}
    whole = {_OWN + name: value for name, value in own.items()}
    return BatchedStep(module, tuple(state), fixed, whole, tape.largest, last)


def _copies(many: Mapping[str, Tensor], fits: int, dim: int) -> dict[str, Tensor]:
    return {name: torch.stack([value] * fits, dim) for name, value in many.items()}


def _recorded(
    pure: fx.GraphModule, many: dict[str, Tensor], shared: Mapping[str, Tensor], state: Sequence[str], last: bool
) -> tuple[Tracer, fx.GraphModule]:
    names = [node.target for node in pure.graph.nodes if node.op == "placeholder"]
    tape = Tracer({_OWN + name if name.startswith(("constant", "number")) else name: v for name, v in many.items()})
    with tape, torch.no_grad():
        whole = {name: value.clone() if _is_folded(value) else value for name, value in shared.items()}
        if last:
            loss, *after = run_batched(pure.graph, whole, many, long_products=True)
        else:
            loss, *after = _by_vmap(pure, names, many, whole)
        for name, value in zip(state, after, strict=True):
            many[name].copy_(value)
    return tape, fx.GraphModule({}, tape.finish(loss))


def _by_vmap(pure: fx.GraphModule, names: Sequence[Any], many: dict[str, Tensor], whole: dict[str, Tensor]) -> Any:
    graph = fx.Graph()
    graph.output(graph.graph_copy(pure.graph, {}))
    for node in graph.nodes:
        if node.target is aten.copy.default:  # which has no rule for a batch
            node.target = _assigned
    module = fx.GraphModule({}, graph)

    def one(own: dict[str, Tensor]) -> Any:
        values = {**whole, **own}
        return module(*(values[name] for name in names))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        return torch.vmap(one)(many)


def _assigned(to: Tensor, value: Tensor) -> Tensor:
    return value.expand_as(to).to(to.dtype)


def _is_folded(value: Tensor) -> bool:
    """Whether it is 0 or 1 everywhere, which makes operators vanish."""
    if value.numel() == 0 or value.numel() > 4096 or not value.is_floating_point():
        return False
    first = value.reshape(-1)[0].item()
    return first in (0.0, 1.0) and bool((value == first).all())


def _constants(recordings: Sequence[TracedFit]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those that differ from fit to fit, stacked, and those that all share."""
    own, shared = {}, {}
    for i, values in enumerate(zip(*(one.constants for one in recordings), strict=True)):
        first = values[0]
        if all(value is first for value in values) or all(torch.equal(value, first) for value in values[1:]):
            shared[f"constant{i}"] = first
        else:
            own[f"constant{i}"] = torch.stack(values)
    return own, shared


def _outline(graph: fx.Graph) -> tuple[str, list[float]]:
    """The graph in words, without names and floating-point numbers, and those numbers in order."""
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


def _with_inputs(graph: fx.Graph, numbers: Sequence[Sequence[float]]) -> tuple[fx.Graph, dict[str, list[float]]]:
    """A copy of the graph in which numbers that differ are inputs, and those by name."""
    columns = list(zip(*numbers, strict=True))
    differ = {i for i, column in enumerate(columns) if any(value != column[0] for value in column[1:])}
    twin = fx.Graph()
    twin.output(twin.graph_copy(graph, {}))
    found: dict[str, list[float]] = {}
    place = 0
    for node in list(twin.nodes):
        count = _floats(node)
        chosen = [i for i in range(place, place + count) if i in differ]
        if chosen:
            first = next(iter(twin.nodes))
            inputs = {}
            for i in chosen:
                with twin.inserting_before(first):
                    inputs[i - place] = twin.placeholder(f"number{i}")
                found[f"number{i}"] = list(columns[i])
            _put_in(twin, node, inputs)
        place += count
    return twin, found


def _floats(node: fx.Node) -> int:
    found: list[float] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda v: found.append(v) if isinstance(v, float) else v)
    return len(found)


def _put_in(graph: fx.Graph, node: fx.Node, inputs: Mapping[int, fx.Node]) -> None:
    """Let an operator take inputs in the place of its numbers, by the form of it that takes tensors."""
    seen = iter(range(10**6))

    def replaced(value: Any) -> Any:
        return inputs.get(next(seen), value) if isinstance(value, float) else value

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replaced)
    target: Any = node.target
    if target is aten.full.default:
        node.target, node.args, node.kwargs = aten.expand.default, (args[1], args[0]), {}
    else:
        node.target, node.args, node.kwargs = target.overloadpacket, args, kwargs


def _pure(
    graph: fx.Graph, examples: Mapping[str, Tensor], state: Sequence[str]
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """Loss and new state as outputs of a graph that writes to nothing, and its further inputs."""
    module = fx.GraphModule({}, graph)
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
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
    for node in list(found.nodes):
        if node.target is aten.copy_.default:
            if node.args[0].op != "placeholder" or node.users:
                raise Untraceable("it writes to memory in a way that many fits cannot")
            found.erase_node(node)
    for node in found.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema") and node.target._schema.is_mutable:
            raise Untraceable(f"it writes to memory by {node.target}, which many fits cannot")
    found.eliminate_dead_code()
    further = [node for node in found.nodes if node.op == "placeholder"][len(names) :]
    for i, node in enumerate(further):
        node.target = f"made{i}"
    return fx.GraphModule({}, found), {f"made{i}": value for i, value in enumerate(tape.constants)}
