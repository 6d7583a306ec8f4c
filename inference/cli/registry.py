"""Models, guides and data by name: from entry points, or from the user's own ``module:function``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any

from torch import nn

from inference.utils.random_state import RandomStream

__all__ = ["build_guide", "build_model", "find", "is_own_code", "names", "read_rows", "read_table", "suggested_options"]


@cache
def _entries(group: str) -> EntryPoints:
    """Return the entry points of ``kiln.<group>``; cached, as it reads the metadata of all packages."""
    return entry_points(group=f"kiln.{group}")


def names(group: str) -> list[str]:
    """Return the names registered as ``kiln.<group>``: ``models``, ``guides``, ``data``, ``readers``, ``options``."""
    return sorted({entry.name for entry in _entries(group)})


def is_own_code(group: str, reference: str) -> bool:
    """Return True if the reference names code that no installed package registers and that is no autoguide of Pyro."""
    return reference not in names(group) and not re.fullmatch(r"pyro\.infer\.autoguide:Auto\w+", reference)


def find(group: str, reference: str) -> Any:
    """Return the registered object of that name, or the one at ``module:attribute``, from the current folder first.

    Raises
    ------
    ValueError
        If there is no such name, module or attribute.
    """
    for entry in _entries(group).select(name=reference):
        return entry.load()
    kind = group.removesuffix("s")
    if ":" not in reference:
        known = ", ".join(names(group))
        raise ValueError(
            f"there is no {kind} named {reference!r}: `kiln list` shows {known}; your own is module:function"
        )
    found = _attribute(reference, kind)
    if not callable(found):
        raise ValueError(f"{kind} {reference!r} is {found!r}, which cannot be called: give a function or a class")
    return found


def _attribute(reference: str, kind: str) -> Any:
    module_name, _, attribute = reference.partition(":")
    if not module_name or module_name.startswith(".") or not attribute:
        raise ValueError(f"{kind} {reference!r} is not module:function: write for example mymodel:{attribute or kind}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{kind} {reference!r}: there is no module {error.name!r} here or installed") from error
    except Exception as error:
        raise ValueError(
            f"{kind} {reference!r}: importing {module_name} failed with {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{kind} {reference!r}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def suggested_options(model: str, x: Any, y: Any) -> dict[str, Any]:
    """Return the keyword arguments that a registered model suggests for this training data; none for the user's own."""
    if model not in names("options"):
        return {}
    options: dict[str, Any] = find("options", model)(x, y)
    return options


def build_model(reference: str, options: dict[str, Any], seed: int) -> Any:
    """Return a model function with its keyword arguments, or a network built from them, initialised from ``seed``."""
    model = find("models", reference)
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        return partial(model, **options) if options else model
    try:
        with RandomStream.seeded(seed).active():
            return model(**options)
    except Exception as error:  # the options may come from a run folder, and be anything
        raise ValueError(f"model {reference!r} cannot be made from {options}: {error}; bind with --set") from error


def build_guide(reference: str, model: Callable[..., Any]) -> Any:
    """Build a registered guide or an autoguide class for ``model``; return a guide function as it is."""
    guide = find("guides", reference)
    is_builder = reference in names("guides") or (isinstance(guide, type) and issubclass(guide, nn.Module))
    if not is_builder:
        return guide
    try:
        return guide(model)
    except Exception as error:
        raise ValueError(f"guide {reference!r} cannot be built for the model: {error}") from error


def read_table(source: str, target: str | None = None, columns: list[str] | None = None) -> Any:
    """Read a registered data set by name, or a file by its ending.

    Raises
    ------
    ValueError, FileNotFoundError
        If it is neither, or cannot be read.
    """
    if source in names("data"):
        table = find("data", source)()
        if columns is None and target is not None and target != table.target:
            raise ValueError(f"{source} is for predicting {table.target!r}, not {target!r}: leave --target out")
        return table
    path = Path(source)
    kinds = names("readers")
    if not path.is_file():
        known = ", ".join(names("data"))
        raise FileNotFoundError(f"there is no file {source!r}, nor a data set of that name: `kiln list` shows {known}")
    ending = path.suffix.removeprefix(".").lower()
    if ending not in kinds:
        raise ValueError(
            f"{source} ends in {path.suffix!r}: give a file that ends in {', '.join('.' + k for k in kinds)}"
        )
    return find("readers", ending)(path, target, columns)


def read_rows(source: str, target: str, columns: list[str]) -> Any:
    """Return the rows to predict, (N, D) in the order of ``columns``, or the path of an .npy or .zarr as it is.

    Raises
    ------
    ValueError, FileNotFoundError
        As :func:`read_table`; if there are other columns.
    """
    path = Path(source)
    if path.suffix in (".npy", ".zarr") and path.exists():
        return path
    x = read_table(source, target, columns).x
    if x.shape[1] != len(columns):
        raise ValueError(f"{source} has {x.shape[1]} columns but the fit had {len(columns)}: {columns}")
    return x
