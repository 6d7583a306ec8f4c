"""Nested values taken apart into JSON and tensors, so that any state goes to disk without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["flatten", "unflatten"]


def flatten(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """``value`` as JSON in which each tensor is named, and the tensors by name.

    Dicts, lists, tuples, tensors, numbers, strings and None, nested in any way.
    Floats that JSON does not have are written as words.

    Raises
    ------
    TypeError
        If anything else is in it.

    >>> import torch
    >>> content, tensors = flatten({"step": 3, "betas": (0.9, float("inf")), "m": [torch.ones(2)]})
    >>> sorted(tensors), unflatten(content, tensors)
    (['0'], {'step': 3, 'betas': (0.9, inf), 'm': [tensor([1., 1.])]})
    """
    tensors: dict[str, Tensor] = {}
    return _packed(value, tensors), tensors


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[_packed(key, tensors), _packed(part, tensors)] for key, part in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(part, tensors) for part in value]}
    if isinstance(value, list):
        return [_packed(part, tensors) for part in value]
    raise TypeError(f"a {type(value).__name__} is no number, text, tensor or container of them")


def unflatten(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that :func:`flatten` took apart.

    Raises
    ------
    ValueError
        If ``content`` is not what :func:`flatten` makes, or a tensor is missing.
    """
    if isinstance(content, list):
        return [unflatten(part, tensors) for part in content]
    if not isinstance(content, dict):
        return content
    if len(content) != 1:
        raise ValueError(f"a nested value has the keys {sorted(content)[:5]}: it was not written by Kiln")
    ((kind, inner),) = content.items()
    if kind == "tensor" and inner in tensors:
        return tensors[inner]
    if kind == "float" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if kind == "tuple" and isinstance(inner, list):
        return tuple(unflatten(part, tensors) for part in inner)
    if kind == "dict" and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
        return {_key(unflatten(key, tensors)): unflatten(part, tensors) for key, part in inner}
    raise ValueError(f"a nested value of the kind {kind!r} is damaged: it was not written by Kiln")


def _key(key: Any) -> Any:
    if isinstance(key, str | int | float | tuple | None):
        return key
    raise ValueError(f"a nested value has a {type(key).__name__} for a key: it was not written by Kiln")
