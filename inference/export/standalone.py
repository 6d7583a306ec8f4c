"""The modules that read a predictor as one source file, which imports NumPy and the standard library alone."""

from __future__ import annotations

import ast
import inspect

from inference.export.runtime import (
    graph,
    layers,
    operators,
    prediction,
    predictor,
)

__all__ = ["MARK", "module_source"]

MARK = '"""A fitted model that predicts with NumPy alone, written by Kiln.'
_MODULES = (layers, operators, graph, prediction, predictor)
_HEAD = """{mark}

    import {stem}
    p = {stem}.load().predict(x)
    p.mean, p.std, p.interval(0.9), p.draws    # or p.probs, p.labels, p.entropy

It reads {stem}.npz, beside it, and needs Python 3.10 and NumPy 1.26 or newer.
\"\"\"

from __future__ import annotations

{imports}

Array = Any


{bodies}
"""


def module_source(stem: str) -> str:
    """The source of the module that reads ``<stem>.npz``."""
    whole: set[str] = set()
    parts: dict[str, set[str]] = {}
    bodies = []
    for module in _MODULES:
        text = inspect.getsource(module)
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                whole.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom):
                parts.setdefault(node.module or "", set()).update(ast.unparse(name) for name in node.names)
            elif not isinstance(node, ast.Expr) and not ast.unparse(node).startswith(("__all__", "Array =")):
                continue
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
        bodies.append("\n".join(lines).strip())
    theirs = {name: found for name, found in parts.items() if not name.startswith(("inference", "__future__"))}
    froms = [f"from {name} import {', '.join(sorted(found))}" for name, found in sorted(theirs.items())]
    imports = "\n".join([*sorted(whole), *froms])
    return _HEAD.format(mark=MARK, stem=stem, imports=imports, bodies="\n\n\n".join(bodies))
