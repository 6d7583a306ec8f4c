"""What a model computes from its inputs, traced at two numbers of rows and written as plain data for any number.

A trace holds sizes, not formulas: a reshape to (40, 3) does not say that 40 is
the number of rows. So the model is traced at two numbers of rows, and the two
graphs are compared argument by argument. What is equal in both is a fixed
number; what differs has to grow in proportion to the rows, and is written as
``{"n": [a, b]}`` for a + b · rows. Anything else is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from inference.engine.tracing.traced_graph import GraphInput, InputKind, input_of
from inference.engine.tracing.tracer import Tracer
from inference.export.runtime.operators import OPERATORS, RANDOM

__all__ = [
    "NON_NUMERIC_ARGUMENTS",
    "ExportedGraph",
    "NotExportable",
    "export_graph",
    "positional",
    "table_name",
    "type_name",
]

_ROWS = "the model makes something that depends on the number of rows in a way that cannot be written down"


@dataclass(frozen=True)
class ExportedGraph:
    """The ``graph`` of one manifest, the ``arrays`` it reads, and the numbers a row of its largest tensor.

    ``calls`` holds for each random call of the run, in order, the number of its
    value in the graph, None where nothing needs it; ``row_shape`` is the shape of
    the first output without the draws; ``operators`` are torch's, one for each node.
    """

    graph: dict[str, Any]
    arrays: dict[str, np.ndarray]
    calls: list[int | None]
    row_shape: list[Any]
    numbers_a_row: int
    operators: list[Any]


class _TypedTracer(Tracer):
    """A tracer that notes the dtype of every value, and which random call a node stands for.

    The nodes keep ``dtype`` and ``call`` in their ``meta``.
    """

    def _follow(self, value: Tensor, node: fx.Node) -> None:
        node.meta["dtype"] = value.dtype
        super()._follow(value, node)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        calls = len(self.randoms)
        out = super()._record(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            next(node for node in reversed(self.graph.nodes) if node.target is func).meta["call"] = calls - 1
        return out


@dataclass(frozen=True)
class _TracedRun:
    """One trace: its nodes in order, the number of its arguments, and the outputs with their values."""

    tape: _TypedTracer
    arguments: int
    nodes: list[fx.Node]
    outputs: tuple[fx.Node, ...]
    values: tuple[Tensor, ...]


def export_graph(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    inputs: Callable[[int], Mapping[str, Tensor]],
    rows: tuple[int, int] | None,
    known: Mapping[str, np.ndarray],
) -> ExportedGraph:
    """Return ``run``, from named inputs to named outputs, as operators of NumPy for any number of rows.

    ``rows`` are two numbers of rows at which to run it; sizes that differ
    between them grow in proportion. ``known`` arrays are not written again.

    Raises
    ------
    NotExportable
        If there is no NumPy form of an operator, or none for every number of rows.
    Untraceable
        If what ``run`` does cannot be recorded.
    """
    one, names = _run(run, inputs(rows[0] if rows else 0))
    two = _run(run, inputs(rows[1]))[0] if rows else one
    if [(a.op, a.target) for a in one.nodes] != [(b.op, b.target) for b in two.nodes]:
        raise NotExportable(f"{_ROWS}: it runs other operators on {rows} rows")
    return _written(one, two, _Sizes(*(rows or (0, 1))), names, known)


def _run(run: Any, inputs: Mapping[str, Tensor]) -> tuple[_TracedRun, tuple[str, ...]]:
    given = {name: value.clone() for name, value in inputs.items()}
    tape = _TypedTracer({GraphInput(InputKind.ARGUMENT, i): value for i, value in enumerate(given.values())})
    with torch.no_grad(), _small_operators(), tape:
        outputs = run(given)
    graph = tape.finish(*outputs.values())
    *nodes, last = graph.nodes
    return _TracedRun(tape, len(given), nodes, last.args[0], tuple(outputs.values())), tuple(outputs)


@contextmanager
def _small_operators() -> Iterator[None]:
    """Run a transformer's layers as their parts: torch's fused kernels for them have no NumPy form."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _written(
    one: _TracedRun, two: _TracedRun, sizes: _Sizes, names: tuple[str, ...], known: Mapping[str, np.ndarray]
) -> ExportedGraph:
    """Return two traces of one function as plain data.

    The values of the graph are numbered: first the arguments, then the constants, then the nodes in order. So the
    constants, among them the parameters of random calls, have to be known before the first node is written.
    """
    constants = _Constants(sizes, {_key(array): name for name, array in known.items()}, one.arguments)
    twins = list(zip(one.nodes, two.nodes, strict=True))
    values = _numbered_inputs(one, two, twins, constants)
    draws = _draw_arguments(one, two, twins, constants)
    nodes, operators, calls = _numbered_nodes(one, twins, sizes, values, draws, one.arguments + len(constants.specs))
    graph = {
        "constants": constants.specs,
        "nodes": nodes,
        "outputs": {name: values[node] for name, node in zip(names, one.outputs, strict=True)},
    }
    shape = sizes.number(*(list(run.values[0].shape) for run in (one, two)))
    growth = (two.tape.largest - one.tape.largest) / (sizes.second - sizes.first)
    return ExportedGraph(graph, constants.arrays, calls, shape, max(1, math.ceil(growth)), operators)


_Twins = Sequence[tuple[fx.Node, fx.Node]]


def _needed(one: _TracedRun) -> set[fx.Node]:
    return {argument for node in one.nodes for argument in node.all_input_nodes} | set(one.outputs)


def _numbered_inputs(one: _TracedRun, two: _TracedRun, twins: _Twins, constants: _Constants) -> dict[fx.Node, int]:
    """Return the numbers of the arguments, and of the constants that are needed, which are added to ``constants``."""
    values, needed = {}, _needed(one)
    for node, twin in twins:
        given, other = input_of(node), input_of(twin)
        if given is None or other is None:
            continue
        if given.kind is InputKind.ARGUMENT:
            values[node] = given.index
        elif given.kind is InputKind.CONSTANT and node in needed:
            values[node] = constants.add(one.tape.constants[given.index], two.tape.constants[other.index])
    return values


def _draw_arguments(
    one: _TracedRun, two: _TracedRun, twins: _Twins, constants: _Constants
) -> dict[fx.Node, tuple[int, list[Any]]]:
    """Return, for each random call with a fixed distribution that is needed, its number and its arguments.

    Tensors among the arguments become constants. An operator that fills a tensor, such as ``normal_``, has the shape
    as its first argument instead.
    """
    found, needed, sizes = {}, _needed(one), constants.sizes
    for node, twin in twins:
        given, other = input_of(node), input_of(twin)
        if given is None or other is None or given.kind is not InputKind.DRAW or node not in needed:
            continue
        first, second = one.tape.draws[given.index], two.tape.draws[other.index]
        arguments = [sizes.number(list(first.shape), list(second.shape))] if first.in_place else []
        for a, b in zip(positional(first, first.in_place), positional(second, first.in_place), strict=True):
            arguments.append({"v": constants.add(a, b)} if isinstance(a, Tensor) else sizes.argument(a, b, {}))
        found[node] = given.index, arguments
    return found


def _numbered_nodes(
    one: _TracedRun,
    twins: _Twins,
    sizes: _Sizes,
    values: dict[fx.Node, int],
    draws: Mapping[fx.Node, tuple[int, list[Any]]],
    start: int,
) -> tuple[list[list[Any]], list[Any], list[int | None]]:
    """Return the nodes as plain data, their operators, and the values of the random calls; number the nodes.

    A node is ``[name, arguments, dtype, whether it writes to its first argument]``.
    """
    nodes: list[list[Any]] = []
    operators: list[Any] = []
    calls: list[int | None] = [None] * len(one.tape.randoms)
    for node, twin in twins:
        if node.op != "call_function" and node not in draws:
            continue
        values[node] = start + len(nodes)
        func: Any = node.target
        operators.append(func)
        if node in draws:
            number, arguments = draws[node]
            draw = one.tape.draws[number]
            calls[one.tape.randoms.index(number)] = values[node]
            nodes.append([table_name(draw.func), arguments, type_name(draw.dtype), False])
        elif func is operator.getitem:
            arguments = [{"v": values[node.all_input_nodes[0]]}, node.args[1]]
            nodes.append(["getitem", arguments, type_name(node.meta.get("dtype")), False])
        else:
            if "call" in node.meta:
                calls[node.meta["call"]] = values[node]
            pairs = zip(positional(node), positional(twin), strict=True)
            dtype = type_name(node.meta.get("dtype", node.kwargs.get("dtype")))
            arguments = [sizes.argument(a, b, values) for a, b in pairs]
            nodes.append([table_name(func), arguments, dtype, bool(func._schema.is_mutable)])
    return nodes, operators, calls


@dataclass(frozen=True)
class _Sizes:
    """The two numbers of rows, and how what was found at both is written for any number."""

    first: int
    second: int

    def argument(self, a: Any, b: Any, values: Mapping[fx.Node, int]) -> Any:
        """Return the argument of an operator: a value of the graph, a list, a dtype or a number."""
        if isinstance(a, fx.Node):
            return {"v": values[a]}
        if isinstance(a, list | tuple):
            if len(a) != len(b):
                raise NotExportable(_ROWS)
            return [self.argument(x, y, values) for x, y in zip(a, b, strict=True)]
        return {"t": type_name(a)} if isinstance(a, torch.dtype) else self.number(a, b)

    def number(self, a: Any, b: Any) -> Any:
        """Return a number, or a list of them, that is the same at both; ``{"n": [a, b]}`` if it grows with the rows."""
        if isinstance(a, list):
            return self.argument(a, b, {})
        if a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
            return a
        slope = (b - a) / (self.second - self.first) if isinstance(a, int) and isinstance(b, int) else math.nan
        if not math.isfinite(slope) or slope != round(slope):
            raise NotExportable(f"{_ROWS}: {a} on {self.first} rows, {b} on {self.second}")
        return {"n": [a - round(slope) * self.first, round(slope)]}


@dataclass
class _Constants:
    """The tensors that the graph reads: how each is made (``specs``) of ``arrays``, numbered after the arguments.

    ``names`` are the arrays by their content, so that none is kept twice.
    """

    sizes: _Sizes
    names: dict[tuple[str, bytes], str]
    arguments: int
    specs: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, a: Tensor, b: Tensor) -> int:
        """Add a constant, given at both numbers of rows, and return its number among the values of the graph."""
        self.specs.append(self._spec(a.detach().cpu(), b.detach().cpu()))
        return self.arguments + len(self.specs) - 1

    def _spec(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        """Return how a constant is made; what is the same along a dimension is kept once."""
        counting = a.dim() == 1 and a.shape != b.shape and a.dtype == torch.int64
        if counting and all(torch.equal(v, torch.arange(len(v))) for v in (a, b)):
            return {"rows": "int64"}
        if a.dim() != b.dim():
            raise NotExportable(_ROWS)
        sizes = self.sizes.number(list(a.shape), list(b.shape))
        short, twin = _once(a, a.shape, b.shape), _once(b, b.shape, a.shape)
        if short is None or twin is None or not torch.allclose(short, twin, rtol=0, atol=0, equal_nan=True):
            raise NotExportable(f"{_ROWS}: a tensor of shape {tuple(a.shape)} on {self.sizes.first} rows")
        # The array is stored in the order of its memory; ``order`` turns it back into the order of its dimensions.
        strides = list(short.stride())
        order = sorted(range(short.dim()), key=lambda d: (-strides[d], d))
        stored = np.array(short.permute(order).numpy(), order="C")
        new = f"constant{len(self.arrays)}"
        name = self.names.setdefault(_key(stored), new)
        if name == new:
            self.arrays[name] = stored
        turned = [order.index(d) for d in range(short.dim())]
        return {"array": name, "shape": list(stored.shape), "order": turned, "sizes": sizes}


def _once(value: Tensor, shape: Sequence[int], other: Sequence[int]) -> Tensor | None:
    """Return ``value`` with one of each dimension that repeats or holds the rows; None if rows differ in it."""
    for dim in range(value.dim() if value.numel() else 0):
        first = value.narrow(dim, 0, 1)
        if shape[dim] != other[dim]:
            if not torch.allclose(value, first.expand_as(value), rtol=0, atol=0, equal_nan=True):
                return None
            value = first
        elif value.stride(dim) == 0 and shape[dim] > 1:
            value = first
    return value


def _key(array: np.ndarray) -> tuple[str, bytes]:
    return str(array.dtype), array.tobytes()


_PLAIN = {
    "default", "Tensor", "Scalar", "self", "int", "Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor", "Tensor_float",
    "float_Tensor", "float", "ScalarSelf", "ScalarOther",
}  # fmt: skip
NON_NUMERIC_ARGUMENTS = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "generator", "copy"}


class NotExportable(ValueError):
    """Why a model cannot be written as operators of NumPy."""


def positional(node: Any, without_first: bool = False) -> list[Any]:
    """The arguments in the order of torch's schema, without those that say where a tensor lies."""
    func: Any = node.target if isinstance(node, fx.Node) else node.func
    schema = func._schema.arguments[without_first:]
    found = []
    for i, argument in enumerate(schema):
        if argument.name not in NON_NUMERIC_ARGUMENTS:
            default = argument.default_value if argument.has_default_value() else None
            found.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default))
    return found


def table_name(func: Any) -> str:
    """What the operator is called in the table, or one error that names it."""
    schema = getattr(func, "_schema", None)
    packet, _, overload = str(func).removeprefix("aten.").rpartition(".")
    if schema is not None and func.namespace == "aten":
        tables = (RANDOM,) if torch.Tag.nondeterministic_seeded in func.tags else (OPERATORS,)
        bare = packet.removesuffix("_") if schema.is_mutable and tables != (RANDOM,) else packet
        names = [f"{bare}.{overload}", *([bare] if overload in _PLAIN else [])]
        found = next((name for table in tables for name in names if name in table), None)
        if found is not None:
            return found
    raise NotExportable(f"the model uses the operator {func}, which has no NumPy form")


def type_name(dtype: Any) -> str | None:
    """What NumPy calls a type of torch."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name in ("bfloat16", "complex64", "complex128"):
        raise NotExportable(f"the model computes in {name}, which has no NumPy form here")
    return name
