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


# An operator of torch may bring C++ of its own, so that a compiled step does not go back to Python for it: the text is
# the attribute ``cpp`` of its overload (``torch.ops.kiln.tanh_recurrence.default.cpp``, in guides/tanh_recurrence.py).
# What the text and the operator have to keep to:
#
# - The text defines ``template <typename T> static void name(…)``, where ``name`` is the operator's own, without its
#   namespace and its overload. It may use torch's headers for vectors (``at::vec``) and what cpp/prelude.h defines.
# - The parameters are, in this order: a pointer for each argument (``const T*``), a pointer for each result (``T*``),
#   and then two numbers (``long``) for each argument: its rows, and the numbers in a row. For an argument of the shape
#   (n, …) these are n and the product of the other sizes; a vector has rows of one number, and an argument without
#   dimensions is one row of one number. Results have no sizes of their own: they have to follow from the arguments.
# - All arguments are tensors. Arguments and results are contiguous and of one type, float or double, which is ``T``.
#   Where a step calls the operator with anything else, torch makes the call instead, which goes back to Python.
# - The function writes every number of its results, whose memory held other numbers before, and changes no argument.
# - The operator needs ``register_fake``, as graphs are traced without numbers, and a gradient that is traced is an
#   operator of its own, with its own C++.
# - For several particles or fits in one step it needs ``register_vmap``. The engine's own rules (batching_rules.py) put
#   the particles last and run the operator once, with longer rows of its first argument: the C++ has to treat each
#   column of the rows by itself, and the other arguments have to be common to all particles.
def native_code(func: Any) -> str | None:
    """Return the C++ that an operator has as its attribute ``cpp``; None if it has none."""
    return getattr(func, "cpp", None)
