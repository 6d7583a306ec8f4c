"""What a model computes from its inputs, recorded at two numbers of rows and written as plain data for any number."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from inference.engine.tracing.tracer import Tracer
from inference.export.operator_names import NotExportable, positional, table_name, type_name

__all__ = ["ExportedGraph", "export_graph"]

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


class _Notes(Tracer):
    """A tape that notes the type of every value, and which random call a node stands for."""

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
    """One recording: its nodes in order, what the placeholders hold, and the outputs."""

    tape: _Notes
    inputs: tuple[str, ...]
    nodes: list[fx.Node]
    outputs: tuple[fx.Node, ...]
    values: tuple[Tensor, ...]


def export_graph(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    inputs: Callable[[int], Mapping[str, Tensor]],
    rows: tuple[int, int] | None,
    known: Mapping[str, np.ndarray],
) -> ExportedGraph:
    """``run``, from named inputs to named outputs, as operators of NumPy for any number of rows.

    ``rows`` are two numbers of rows at which to run it; sizes that differ
    between them grow in proportion. ``known`` arrays are not written again.

    Raises
    ------
    NotExportable
        If there is no NumPy form of an operator, or none for every number of rows.
    Untraceable
        If what ``run`` does cannot be recorded.
    """
    one = _run(run, inputs(rows[0] if rows else 0))
    two = _run(run, inputs(rows[1])) if rows else one
    same = [(a.op, a.target) for a in one[0].nodes] == [(b.op, b.target) for b in two[0].nodes]
    if not same:
        raise NotExportable(f"{_ROWS}: it runs other operators on {rows} rows")
    return _Writer(one[0], two[0], rows or (0, 1), known).written(one[1])


def _run(run: Any, inputs: Mapping[str, Tensor]) -> tuple[_TracedRun, tuple[str, ...]]:
    given = {name: value.clone() for name, value in inputs.items()}
    tape = _Notes({f"input{i}": value for i, value in enumerate(given.values())})
    with torch.no_grad(), _small_operators(), tape:
        outputs = run(given)
    graph = tape.finish(*outputs.values())
    *nodes, last = graph.nodes
    return _TracedRun(tape, tuple(given), nodes, last.args[0], tuple(outputs.values())), tuple(outputs)


@contextmanager
def _small_operators() -> Iterator[None]:
    """Layers of a transformer by their parts."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Writer:
    """Two recordings of one function, side by side, on their way to JSON."""

    def __init__(
        self, one: _TracedRun, two: _TracedRun, rows: tuple[int, int], known: Mapping[str, np.ndarray]
    ) -> None:
        self.one, self.two, self.rows = one, two, rows
        self.arrays: dict[str, np.ndarray] = {}
        self.known = {_key(array): name for name, array in known.items()}
        self.constants: list[dict[str, Any]] = []
        self.nodes: list[list[Any]] = []
        self.operators: list[Any] = []
        self.places: dict[fx.Node, Any] = {}
        self.twins = dict(zip(one.nodes, two.nodes, strict=True))
        self.calls: list[int | None] = [None] * len(one.tape.randoms)

    def written(self, names: tuple[str, ...]) -> ExportedGraph:
        """The whole as plain data."""
        inputs = [f"input{i}" for i in range(len(self.one.inputs))]
        held = [node for node in self.one.nodes if node.op == "placeholder" and str(node.target).startswith("constant")]
        drawn = {node for node in self.one.nodes if node.op == "placeholder" and str(node.target).startswith("draw")}
        needed = {argument for node in self.one.nodes for argument in node.all_input_nodes} | set(self.one.outputs)
        for node in self.one.nodes:
            if node.op == "placeholder" and node.target in inputs:
                self.places[node] = inputs.index(node.target)
        for i, node in enumerate(node for node in held if node in needed):
            self.places[node] = len(inputs) + i
            self.constants.append(self._constant(*self._held(node)))
        pending = [node for node in self.one.nodes if node.op == "call_function" or (node in drawn and node in needed)]
        extra = self._draws_arguments([node for node in pending if node in drawn], len(inputs))
        for node in pending:
            self._write(node, len(inputs) + len(self.constants), extra.get(node))
        graph = {
            "constants": self.constants,
            "nodes": self.nodes,
            "outputs": {name: self.places[node] for name, node in zip(names, self.one.outputs, strict=True)},
        }
        shapes = [list(run.values[0].shape) for run in (self.one, self.two)]
        growth = (self.two.tape.largest - self.one.tape.largest) / (self.rows[1] - self.rows[0])
        return ExportedGraph(
            graph, self.arrays, self.calls, self._number(*shapes), max(1, math.ceil(growth)), self.operators
        )

    def _held(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        place = int(str(node.target).removeprefix("constant"))
        twin = int(str(self.twins[node].target).removeprefix("constant"))
        return self.one.tape.constants[place], self.two.tape.constants[twin]

    def _draws_arguments(self, drawn: list[fx.Node], inputs: int) -> dict[fx.Node, list[Any]]:
        """The arguments of random calls with a fixed distribution: the tensors among them become constants."""
        found = {}
        for node in drawn:
            number = int(str(node.target).removeprefix("draw"))
            first, second = self.one.tape.draws[number], self.two.tape.draws[number]
            shape = [self._number(list(first.shape), list(second.shape))] if first.in_place else []
            arguments = []
            for a, b in zip(positional(first, first.in_place), positional(second, first.in_place), strict=True):
                if isinstance(a, Tensor):
                    self.constants.append(self._constant(a, b))
                    arguments.append({"v": inputs + len(self.constants) - 1})
                else:
                    arguments.append(self._argument(a, b))
            found[node] = [*shape, *arguments]
        return found

    def _write(self, node: fx.Node, first: int, given: list[Any] | None) -> None:
        twin = self.twins[node]
        self.places[node] = first + len(self.nodes)
        self.operators.append(node.target)
        if given is not None:  # a draw
            number = int(str(node.target).removeprefix("draw"))
            draw = self.one.tape.draws[number]
            self.calls[self.one.tape.randoms.index(number)] = self.places[node]
            self.nodes.append([table_name(draw.func), given, type_name(draw.dtype), False])
            return
        if node.target is operator.getitem:
            arguments = [self._argument(node.args[0], None), node.args[1]]
            self.nodes.append(["getitem", arguments, type_name(node.meta.get("dtype")), False])
            return
        if "call" in node.meta:
            self.calls[node.meta["call"]] = self.places[node]
        pairs = zip(positional(node), positional(twin), strict=True)
        func: Any = node.target
        dtype = node.meta.get("dtype", node.kwargs.get("dtype"))
        arguments = [self._argument(a, b) for a, b in pairs]
        self.nodes.append([table_name(func), arguments, type_name(dtype), bool(func._schema.is_mutable)])

    def _argument(self, a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node):
            return {"v": self.places[a]}
        if isinstance(a, list | tuple):
            return self._all(a, b)
        return {"t": type_name(a)} if isinstance(a, torch.dtype) else self._number(a, b)

    def _all(self, a: Sequence[Any], b: Any) -> list[Any]:
        if len(a) != len(b):
            raise NotExportable(_ROWS)
        return [self._argument(x, y) for x, y in zip(a, b, strict=True)]

    def _number(self, a: Any, b: Any) -> Any:
        """A number as it is in both, or for a size that grows with the rows ``{"n": [a, b]}``."""
        if isinstance(a, list):
            return self._all(a, b)
        if a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
            return a
        slope = (b - a) / (self.rows[1] - self.rows[0]) if isinstance(a, int) and isinstance(b, int) else math.nan
        if slope != round(slope) if math.isfinite(slope) else True:
            raise NotExportable(f"{_ROWS}: {a} on {self.rows[0]} rows, {b} on {self.rows[1]}")
        return {"n": [a - round(slope) * self.rows[0], round(slope)]}

    def _constant(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        """A constant: what is the same along a dimension is kept once."""
        a, b = a.detach().cpu(), b.detach().cpu()
        counting = a.dim() == 1 and a.shape != b.shape and a.dtype == torch.int64
        if counting and all(torch.equal(v, torch.arange(len(v))) for v in (a, b)):
            return {"rows": "int64"}
        if a.dim() != b.dim():
            raise NotExportable(_ROWS)
        sizes = self._number(list(a.shape), list(b.shape))
        short, twin = _once(a, a.shape, b.shape), _once(b, b.shape, a.shape)
        if short is None or twin is None or not torch.allclose(short, twin, rtol=0, atol=0, equal_nan=True):
            raise NotExportable(f"{_ROWS}: a tensor of shape {tuple(a.shape)} on {self.rows[0]} rows")
        strides = list(short.stride())
        order = sorted(range(short.dim()), key=lambda d: (-strides[d], d))
        stored = np.array(short.permute(order).numpy(), order="C")
        name = self.known.setdefault(_key(stored), f"constant{len(self.arrays)}")
        if name == f"constant{len(self.arrays)}":
            self.arrays[name] = stored
        turned = [order.index(d) for d in range(short.dim())]
        return {"array": name, "shape": list(stored.shape), "order": turned, "sizes": sizes}


def _once(value: Tensor, shape: Sequence[int], other: Sequence[int]) -> Tensor | None:
    """``value`` with one of each dimension that is repeated, or that is of the rows; None if rows differ in it."""
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
