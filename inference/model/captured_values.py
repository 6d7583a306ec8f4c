"""Values that a model captures and a compiled step has fixed: closures, globals, arguments, attributes."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["captured", "changed", "is_foreign", "outside_values"]

_FOREIGN = ("torch", "pyro", "numpy", "builtins", "inference")
_DEPTH = 6


def outside_values(functions: Iterable[Any], by_value: bool = False) -> dict[str, Any]:
    """Name → a mark of the value, for all that ``functions`` can reach beside their arguments.

    Two calls give different marks for a name exactly if its value was rebound
    or changed in between, as far as numbers, strings, arrays, tensors and plain
    containers of them go. Parameters, which a fit changes, are left out. The mark
    of a tensor is of this one, or ``by_value`` of its numbers, as copies share it.
    """
    marks: dict[str, Any] = {}
    seen: set[int] = set()
    for function in functions:
        _visit(function, getattr(function, "__name__", type(function).__name__), marks, seen, _DEPTH, by_value)
    return marks


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names whose marks differ."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _visit(value: Any, name: str, marks: dict[str, Any], seen: set[int], depth: int, by_value: bool) -> None:
    if isinstance(value, bool | int | float | str | bytes | complex | type(None)):
        marks[name] = value
        return
    if isinstance(value, Tensor):
        if not value.requires_grad:
            if by_value:
                marks[name] = str(value.dtype), tuple(value.shape), _digest(value.detach().cpu().numpy())
            else:
                marks[name] = id(value), value._version
        return
    if isinstance(value, np.ndarray):
        marks[name] = _digest(value)
        return
    if id(value) in seen or depth == 0:
        return
    seen.add(id(value))
    for part, inner in _parts(value):
        _visit(inner, f"{name}.{part}", marks, seen, depth - 1, by_value)


def _digest(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        return [("func", value.func), *((str(i), v) for i, v in enumerate(value.args)), *value.keywords.items()]
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("func", value.__func__)]
    if isinstance(value, types.FunctionType):
        if not is_foreign(value):
            return captured(value)
        wrapped = getattr(value, "__wrapped__", None)
        return [("wrapped", wrapped)] if wrapped is not None else []
    if isinstance(value, Mapping):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [("len", len(value)), *((str(i), v) for i, v in enumerate(value))]
    if isinstance(value, nn.Module):
        own = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
        return [*own, *value.named_buffers(recurse=False), *value.named_children(), ("forward", value.forward)]
    if isinstance(value, type | types.ModuleType) or is_foreign(type(value)):
        return []
    return [(k, v) for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("__")]


def captured(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Return the values in a function's closure, module and defaults, by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    closure = [(name, cell.cell_contents) for name, cell in cells if _is_filled(cell)]
    names = sorted(_names(function.__code__))
    reachable = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    defaults = list(enumerate(function.__defaults__ or ()))
    keywords = list((function.__kwdefaults__ or {}).items())
    return [*closure, *reachable, *((f"default {i}", v) for i, v in defaults), *keywords]


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def is_foreign(thing: Any) -> bool:
    """Return True if a thing belongs to a library, whose inside a user does not change."""
    return str(getattr(thing, "__module__", "") or "").partition(".")[0] in _FOREIGN
