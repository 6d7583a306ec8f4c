"""A posterior on disk: parameters in safetensors, everything else in JSON, never pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.model.parameters import Params
from inference.storage import tensor_archive
from inference.storage.atomic_files import ADVICE, make_folder
from inference.storage.json_document import (
    ANY,
    FLAG,
    NUMBER,
    SEED,
    SHAPE,
    TEXT,
    WHOLE,
    check,
    digest,
    either,
    list_of,
    mapping_of,
    read_json,
    record,
    versions,
)

__all__ = ["MANIFEST", "assemble", "describe", "identity", "placeholders", "read", "write"]

SCHEMA = 1
STEM = "posterior"
MANIFEST = f"{STEM}.json"
TRACES = ("losses", "kl")
PARAM = "param:"
MOST_BYTES = 2**28  # of all stand-ins for the data of a fit together
FEW_ROWS = 1009  # that stand for more than fit in: a prime, which is no other dimension
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_FLOATS = ("float32", "float64")
_MAYBE_NOT_FINITE = either(NUMBER, "inf", "-inf", "nan")

_ARGUMENT = either(
    record(name=TEXT, shape=SHAPE, dtype=either(*_DTYPES)),
    record(name=TEXT, value=either(None, FLAG, NUMBER, TEXT)),
    record(name=TEXT, object=TEXT),
)
_STOP = record(
    settled=FLAG,
    how=TEXT,
    rhat=either(None, _MAYBE_NOT_FINITE),
    mcse=either(None, _MAYBE_NOT_FINITE),
    doubts=list_of(TEXT),
    interrupted=either(None, TEXT),
)
_MANIFEST = record(
    model=TEXT,
    guide=TEXT,
    dtype=either(*_FLOATS),
    arguments=list_of(_ARGUMENT),
    seconds=_MAYBE_NOT_FINITE,
    seed=SEED,
    options=mapping_of(ANY, steps=WHOLE, batch_size=either(None, WHOLE), anneal=either(None, WHOLE, TEXT)),
    starts=list_of(_MAYBE_NOT_FINITE),
    evaluations=WHOLE,
    stop=either(None, _STOP),
    versions=mapping_of(TEXT),
)


def describe(name: str, value: Any) -> dict[str, Any]:
    """What is kept of an argument of the fit: shape and type of a tensor, never its values."""
    if isinstance(value, Tensor):
        return {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | str) or (NUMBER(value) is None and abs(value) < 2**63):
        return {"name": name, "value": value}
    return {"name": name, "object": type(value).__name__}


def placeholders(arguments: list[dict[str, Any]], folder: Path) -> tuple[Any, ...]:
    """Stand-ins of the right shapes for the arguments, enough to set a guide up.

    Where all rows would take more than 256 MiB they have few rows, as a guide
    needs the number of rows only if rows have latents of their own; the model
    runs on them, so that stand-ins that took no memory themselves would be no help.

    Raises
    ------
    ValueError
        If one was something else than numbers, or if the few rows would be too large.
    """
    size = _size(arguments)
    if size > MOST_BYTES:
        arguments = [_of_few_rows(entry, arguments) for entry in arguments]
    if _size(arguments) > MOST_BYTES:
        raise ValueError(
            f"{folder} was fitted on {size:,} bytes of data, and stand-ins are made for at most {MOST_BYTES:,}: "
            "pass the data to load()"
        )
    found = []
    for entry in arguments:
        if "object" in entry:
            raise ValueError(
                f"{folder} was fitted with {entry['name']!r} a {entry['object']!r}, which is not saved: "
                "pass the data to load()"
            )
        found.append(torch.zeros(entry["shape"], dtype=_dtype(entry)) if "shape" in entry else entry["value"])
    return tuple(found)


def _size(arguments: list[dict[str, Any]]) -> int:
    return sum(math.prod(entry["shape"]) * _dtype(entry).itemsize for entry in arguments if "shape" in entry)


def _of_few_rows(entry: dict[str, Any], arguments: list[dict[str, Any]]) -> dict[str, Any]:
    """The argument with :data:`FEW_ROWS`, if it has as many rows as the first that has any, and more than these."""
    rows = next(other["shape"][0] for other in arguments if other.get("shape"))
    if not entry.get("shape") or entry["shape"][0] != rows:
        return entry
    return {**entry, "shape": [min(rows, FEW_ROWS), *entry["shape"][1:]]}


def _dtype(entry: dict[str, Any]) -> torch.dtype:
    found: torch.dtype = getattr(torch, entry["dtype"])  # one of _DTYPES
    return found


def write(folder: Path, pieces: dict[str, Tensor], traces: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    """Write the posterior into ``folder``, in place of the one that it may have, whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written; the old one is then still there.
    """
    tensors = {PARAM + name: value for name, value in pieces.items()} | traces
    content = {"versions": versions(), **_with_words(manifest)}
    made = not folder.exists()
    make_folder(folder)
    try:
        tensor_archive.write(folder, STEM, tensors, content, SCHEMA)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    return folder


def _with_words(value: Any) -> Any:
    """The value with ``"inf"`` and the like for numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _with_words(part) for name, part in value.items()}
    return [_with_words(part) for part in value] if isinstance(value, list | tuple) else value


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Parameters (unconstrained), the traces ``losses`` and ``kl``, and the manifest of a saved posterior.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is damaged, or was not written by :func:`write`.
    """
    path = folder / MANIFEST
    try:
        tensors, manifest = tensor_archive.read(folder, STEM, SCHEMA)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} is not a saved posterior: it has no {MANIFEST}; give the folder of save()"
        ) from error
    check(path, manifest, _MANIFEST)
    if any(tensors[name].dim() != 1 or not tensors[name].is_floating_point() for name in TRACES if name in tensors):
        raise ValueError(f"{path}: losses or KL are not one number a step: {ADVICE}")
    unknown = [name for name in tensors if name not in TRACES and not name.startswith(PARAM)]
    if unknown or any(name not in tensors for name in TRACES):
        raise ValueError(f"{path}: its tensors are not those of a posterior: {ADVICE}")
    traces = {name: tensors.pop(name) for name in TRACES}
    if len(traces["losses"]) != len(traces["kl"]):
        raise ValueError(f"{path}: {len(traces['losses'])} losses, but KL of {len(traces['kl'])} steps: {ADVICE}")
    manifest["seconds"], manifest["starts"] = float(manifest["seconds"]), [float(loss) for loss in manifest["starts"]]
    if manifest["stop"] is not None:
        for name in ("rhat", "mcse"):
            figure = manifest["stop"][name]
            manifest["stop"][name] = None if figure is None else float(figure)
    return {name.removeprefix(PARAM): value for name, value in tensors.items()}, traces, manifest


def identity(folder: Path) -> str:
    """What tells the posterior in ``folder`` from any other: a hash of its manifest, which has that of its tensors."""
    return digest(read_json(folder / MANIFEST, SCHEMA))


def assemble(folder: Path, params: Params, pieces: dict[str, Tensor]) -> Tensor:
    """The flat vector of ``params`` out of the saved ``pieces``, or a ValueError that names what differs."""
    wanted = {name: _form(leaf) for name, leaf in zip(params.names, params.leaves, strict=True)}
    found = {name: _form(value) for name, value in pieces.items()}
    differ = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if differ:
        first = differ[0]
        raise ValueError(
            f"{folder} does not match this model and guide in {differ}: {first!r} is {found.get(first, 'not')} in the "
            f"file and {wanted.get(first, 'not there')} here: give the model and guide of the fit, and the data if "
            "shapes depend on its values"
        )
    if not params.names:
        return torch.zeros(0)
    return torch.cat([pieces[name].reshape(-1) for name in params.names])


def _form(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
