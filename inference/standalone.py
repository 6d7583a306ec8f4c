"""The modules that read a predictor as one source file, which imports NumPy and the standard library alone."""

from __future__ import annotations

import ast
import inspect

from inference import numpy_graph, numpy_layers, numpy_operators, numpy_prediction, numpy_predictor, numpy_random

__all__ = ["MARK", "module_source"]

MARK = '"""A fitted model that predicts with NumPy alone, written by Kiln: '
_MODULES = (numpy_layers, numpy_operators, numpy_random, numpy_graph, numpy_prediction, numpy_predictor)


def module_source(stem: str) -> str:
    """The source of the module that reads ``<stem>.npz``."""
    imports: dict[str, None] = {}
    bodies = []
    for module in _MODULES:
        text = inspect.getsource(module)
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports[ast.unparse(node)] = None
            elif not isinstance(node, ast.Expr) and not ast.unparse(node).startswith(("__all__", "Array =")):
                continue
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
        bodies.append("\n".join(lines).strip())
    ours = ("from inference", "from __future__")
    head = "\n".join(sorted(line for line in imports if not line.startswith(ours)))
    start = (
        f'{MARK}import {stem}; {stem}.load()."""\n\nfrom __future__ import annotations\n\n{head}\n\nArray = Any\n\n\n'
    )
    return start + "\n\n\n".join(bodies) + "\n"
