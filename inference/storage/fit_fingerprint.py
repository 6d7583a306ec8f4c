"""Fingerprints of a model, a guide, options and data, which another process computes again.

They tell if a checkpoint, or a prediction that is half written, belongs to the
same fit, and if not, what differs.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import math
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inference.data.arguments import sha256_of
from inference.model.bound_model import name_of
from inference.model.captured_values import captured, is_foreign

__all__ = ["describe_differences", "fingerprint_of", "fingerprint_of_data"]

_DEPTH = 6
Fingerprint = dict[str, Any]


def fingerprint_of(value: Any, name: str) -> Fingerprint:
    """Return marks, by name, of the parts of ``value``: a model, a guide or an option of a fit.

    The mark of a function or a class is the SHA-256 of its source. Numbers,
    texts, tensors, arrays and functions that it takes from closures, globals
    and attributes have a mark each. That of a parameter, which a fit changes,
    is its shape.

    >>> from functools import partial
    >>> from kiln.models import linear_regression
    >>> one, other = (fingerprint_of(partial(linear_regression, noise=noise), "model") for noise in (0.1, 0.2))
    >>> describe_differences(one, other)
    ['model.noise is 0.1 there and 0.2 here']
    """
    found: Fingerprint = {}
    _visit(value, name, found, set(), _DEPTH, settings=True)
    return found


def fingerprint_of_data(names: list[str], args: tuple[Any, ...]) -> Fingerprint:
    """Return the marks of a fit's arguments: shape, type and SHA-256 of the values of each tensor."""
    pairs = zip(names, args, strict=True)
    return {name: _of_tensor(value) if isinstance(value, Tensor) else _plain(value) for name, value in pairs}


def describe_differences(there: Fingerprint, here: Fingerprint) -> list[str]:
    """Return a description of each difference, by name."""
    found = []
    for name in {**there, **here}:
        marks = there.get(name, _MISSING), here.get(name, _MISSING)
        if marks[0] != marks[1]:
            old, new = map(_shown, marks)
            found.append(f"{name} has changed" if old == new else f"{name} is {old} there and {new} here")
    return found


_MISSING, _HASH = "missing", "sha256 "


def _shown(mark: Any) -> str:
    """Return a mark without the hash, which tells a reader nothing."""
    text = str(mark).partition(_HASH)[0].strip() or "source"
    return text if len(text) < 80 else f"{text[:77]}…"


def _visit(value: Any, name: str, found: Fingerprint, seen: set[int], depth: int, settings: bool) -> None:
    """Add the marks of ``value``; with ``settings`` its containers and attributes are options that the user passed."""
    if isinstance(value, bool | int | float | str | bytes | complex | type(None) | torch.dtype | torch.device):
        found[name] = _plain(value)
    elif isinstance(value, Tensor):
        found[name] = _of_tensor(value)
    elif isinstance(value, np.ndarray):
        found[name] = _of_array(value)
    elif id(value) not in seen and depth:
        seen.add(id(value))
        for part, inner, asked in _parts(value, name, found, settings):
            _visit(inner, f"{name}.{part}" if part else name, found, seen, depth - 1, asked)


def _parts(value: Any, name: str, found: Fingerprint, settings: bool) -> list[tuple[str, Any, bool]]:
    """Return the parts of ``value``, each with its name and a flag for settings; add the mark of its source."""
    if isinstance(value, functools.partial):
        given = [*((str(i), part) for i, part in enumerate(value.args)), *value.keywords.items()]
        return [("", value.func, settings), *((part, inner, True) for part, inner in given)]
    if isinstance(value, types.MethodType):
        return [("", value.__self__, settings), (value.__name__, value.__func__, settings)]
    if isinstance(value, types.FunctionType | type):
        return _of_code(value, name, found)
    if not settings:
        return []
    if isinstance(value, Mapping):
        return [(str(part), inner, True) for part, inner in value.items()]
    if isinstance(value, list | tuple):
        return [(str(i), inner, True) for i, inner in enumerate(value)]
    return _of_object(value)


def _of_code(value: types.FunctionType | type, name: str, found: Fingerprint) -> list[tuple[str, Any, bool]]:
    if is_foreign(value):
        # Of our own code the name of the package alone: a checkpoint outlives the module in which something lies.
        top = value.__module__.partition(".")[0]
        found[name] = f"{top if top == 'inference' else value.__module__}.{value.__qualname__}"
        inside = getattr(value, "__wrapped__", None)
        return [] if inside is None else [("wrapped", inside, False)]
    found[f"{name}.source"] = _source(value)
    if isinstance(value, type):
        return []
    # Names outside that the function itself sets, such as a counter of its calls, differ from run to run.
    sets = ("STORE_GLOBAL", "STORE_DEREF")
    changed = {step.argval for step in dis.get_instructions(value) if step.opname in sets}
    return [(part, inner, False) for part, inner in captured(value) if part not in changed]


def _of_object(value: Any) -> list[tuple[str, Any, bool]]:
    has_vars = hasattr(value, "__dict__") and (isinstance(value, nn.Module) or not is_foreign(type(value)))
    shown = vars(value).items() if has_vars else ()
    own = [(part, inner, True) for part, inner in shown if part[:1] != "_" and part != "training"]
    if isinstance(value, nn.Module):
        inner = [*value.named_parameters(recurse=False), *value.named_children()]
        own = [*own, *((part, child, True) for part, child in inner)]
    return [("class", type(value), False), *own]


def _source(thing: Any) -> str:
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError):  # typed in, or made at run time
        text = _code(thing.__code__) if hasattr(thing, "__code__") else thing.__qualname__
    return f"{_HASH}{hashlib.sha256(text.encode()).hexdigest()}"


def _code(code: types.CodeType) -> str:
    inner = [_code(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts]
    return repr((code.co_code, code.co_names, inner))


def _of_tensor(value: Tensor) -> str:
    if value.requires_grad:
        return f"parameter {tuple(value.shape)}"
    return _of_array(value.detach().cpu().numpy())


def _of_array(value: np.ndarray) -> str:
    return f"{value.dtype} {value.shape} {_HASH}{sha256_of(value)}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value) if isinstance(value, torch.dtype | torch.device | bytes | complex) else name_of(value)
