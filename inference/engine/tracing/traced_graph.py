"""What a traced graph consists of: its typed inputs, its operators, and its text.

A traced graph is a :class:`torch.fx.Graph` whose placeholders each hold a
:class:`GraphInput` in ``node.meta["input"]``. The kind of an input says who
provides its value: the state of a fit, the rows of a step, or the tracer. The
name of a placeholder is for readers alone; nothing is decided by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DispatchMode",
    "GraphInput",
    "InputKind",
    "add_input",
    "graph_inputs",
    "graph_text",
    "input_of",
    "native_code",
]


class InputKind(Enum):
    """Source of the value of a graph's input; the value of a member begins the names of its placeholders."""

    PARAMETERS = "theta"  # θ as one vector, changed in place by each step
    MOMENT = "moment"  # state of the optimiser, changed in place by each step
    RATES = "rates"  # numbers of the optimiser that differ from step to step
    BATCH = "batch"  # rows of the data that a step sees
    NOISE = "noise"  # random numbers of a group of draws
    DRAW = "draw"  # result of one random call whose distribution is fixed
    CONSTANT = "constant"  # tensor that the graph reads and that no other input determines
    OWN_CONSTANT = "own_constant"  # the same in a program of many fits, where each fit has a value of its own
    NUMBER = "number"  # number in an operator that differs between fits
    ARGUMENT = "input"  # argument of a function that is traced for itself

    @property
    def is_row(self) -> bool:
        """True if a step reads the next row of the input: its memory holds the values of many steps."""
        return self in (InputKind.RATES, InputKind.BATCH, InputKind.NOISE)


@dataclass(frozen=True)
class GraphInput:
    """One input of a traced graph: its kind, and its position among the inputs of that kind."""

    kind: InputKind
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.index}"


def add_input(graph: fx.Graph, given: GraphInput) -> fx.Node:
    """Add a placeholder for ``given`` at the graph's point of insertion."""
    node = graph.placeholder(str(given))
    node.meta["input"] = given
    return node


def input_of(node: fx.Node) -> GraphInput | None:
    """Return the input that a node stands for; None if it is not a placeholder."""
    found: GraphInput | None = node.meta["input"] if node.op == "placeholder" else None
    return found


def graph_inputs(graph: fx.Graph) -> list[GraphInput]:
    """Return the inputs of a traced graph in the order in which it takes them."""
    return [given for node in graph.nodes if (given := input_of(node)) is not None]


def graph_text(graph: fx.Graph) -> str:
    """Return the graph as text for the key of a cache; values are numbered, so that names do not matter."""
    numbers = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: _Reference(numbers[n]))
        target = node.target if node.op != "placeholder" else ""
        lines.append(f"{numbers[node]} {node.op} {target} {args}")
    return "\n".join(lines)


class _Reference(str):
    """A value's number, without the quotation marks that ``repr`` puts around a text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class DispatchMode(TorchDispatchMode):
    """A mode that runs as plain Python: torch's own would first import TorchDynamo, most of a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def native_code(func: Any) -> str | None:
    """Return the C++ that an operator has as its attribute ``cpp``: a template function with the operator's own name.

    It is called with the pointers of its arguments and results, then for each
    argument its rows and the numbers in a row.
    """
    return getattr(func, "cpp", None)
