"""A graph as text, for keys of caches."""

from __future__ import annotations

from torch import fx

__all__ = ["graph_text"]


def graph_text(graph: fx.Graph) -> str:
    """The graph with its values numbered, so that names do not matter."""
    numbers = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: _Reference(numbers[n]))
        target = node.target if node.op != "placeholder" else ""
        lines.append(f"{numbers[node]} {node.op} {target} {args}")
    return "\n".join(lines)


class _Reference(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
