"""Tensors and a manifest in a folder, replaced together and checked when they are read.

``<stem>.json`` holds the manifest, and names the file beside it that holds the
tensors, with its size and SHA-256. The name of that file changes with its
content, so a write adds a file and then replaces the JSON: a process that is
killed at any moment leaves the old pair or the new one. The tensors are in the
safetensors format, which :mod:`safetensors` reads and writes, as it holds
numbers and no code.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from inference.storage.atomic_files import ADVICE, read_bytes, replacing
from inference.storage.json_document import MOST_BYTES, read_json, refuse_damage, write_json
from inference.utils.errors import printable

__all__ = ["flatten", "read", "unflatten", "write"]

TENSORS = "tensors"
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_MOST = 2**30  # bytes of all tensors together


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], schema: int) -> None:
    """Replace the archive ``stem`` in ``folder``, whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written, with the reason; the old archive is then still there.
    TypeError, ValueError
        If a tensor's type or a value of the manifest cannot be kept.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder), "state", {"w": torch.ones(2)}, {"step": 7}, schema=1)
    ...     read(Path(folder), "state", schema=1)
    ({'w': tensor([1., 1.])}, {'step': 7})
    """
    if TENSORS in manifest:
        raise ValueError(f"{stem}.json: {TENSORS!r} is the archive's own key: give the manifest another")
    content = _serialized(stem, tensors)
    digest = hashlib.sha256(content).hexdigest()
    name = _file_name(stem, digest)
    entry = {"file": name, "bytes": len(content), "sha256": digest}
    try:
        with replacing(folder / name) as partial, partial.open("xb") as file:
            file.write(content)
        write_json(folder / f"{stem}.json", {**manifest, TENSORS: entry}, schema)
    except BaseException:
        with suppress(OSError, ValueError):
            _tidy(folder, stem)
        raise
    with suppress(OSError):
        _tidy(folder, stem)


def read(
    folder: Path, stem: str, schema: int, required: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the manifest that :func:`write` was given.

    Raises
    ------
    FileNotFoundError
        If there is no such archive.
    ValueError
        If it is damaged, of another schema, or lacks a key that is ``required``.
    OSError
        If it cannot be read.
    """
    path = folder / f"{stem}.json"
    entry: dict[str, Any] = {}
    while True:
        manifest = read_json(path, schema, (*required, TENSORS))
        before, entry = entry, _entry(path, stem, manifest.pop(TENSORS))
        file = folder / entry["file"]
        try:
            raw = read_bytes(file, _MOST, entry["bytes"])
        except FileNotFoundError as error:
            if entry == before:  # else the archive was replaced meanwhile, so that its new pair is read
                raise ValueError(f"{path} needs {file.name} beside it, which is not there: {ADVICE}") from error
        else:
            # The bytes that were hashed are the bytes that are used: the file is not opened a second time, as
            # something else could then lie in its place.
            refuse_damage(file, hashlib.sha256(raw).hexdigest(), entry["sha256"])
            return _deserialized(file, raw), manifest


def _entry(path: Path, stem: str, entry: Any) -> dict[str, Any]:
    """Return the manifest's entry for the tensors' file, whose name cannot lead out of the folder."""
    found = entry if isinstance(entry, dict) else {}
    digest, size = found.get("sha256"), found.get("bytes")
    named = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    if not named or found.get("file") != _file_name(stem, str(digest)) or type(size) is not int or size < 0:
        raise ValueError(f"{path} names no file of tensors that write() could have written: {ADVICE}")
    return found


def _file_name(stem: str, digest: str) -> str:
    return f"{stem}-{digest[:16]}.safetensors"


def _serialized(stem: str, tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file as bytes; its dtype and size are checked before anything is copied."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensor {name!r} is {tensor.dtype}, which is not kept: turn it into {_DTYPES[0]}")
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size <= _MOST:
        content = save_tensors(_unshared(tensors))
        size = len(content)
    if size > _MOST:
        raise ValueError(f"{stem} would have {size:,} bytes of tensors, and at most {_MOST:,} are read: keep less")
    return content


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU of which no two share memory, as the library refuses those that do."""
    found, taken = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        found[name] = value.clone() if memory in taken else value
        taken.add(memory)
    return found


def _deserialized(path: Path, raw: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    A forged file can have the right checksum, so whatever the library raises at its content is an error of the
    file: its own error, a missing dtype (``KeyError``), a shape that torch refuses, an assertion, or lack of memory.
    """
    try:
        tensors = load_tensors(raw)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, AssertionError, MemoryError) as error:
        raise ValueError(f"{path} is damaged ({printable(str(error))[:200]}): {ADVICE}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path} is damaged (tensor {name!r} is {tensor.dtype}): {ADVICE}")
    return tensors


def _tidy(folder: Path, stem: str) -> None:
    """Remove the stem's earlier files, and what writes that were cut off have left."""
    pattern = re.compile(rf"{re.escape(stem)}-[0-9a-f]{{16}}\.safetensors")
    path = folder / f"{stem}.json"
    current = read_bytes(path, MOST_BYTES).decode() if path.exists() else ""
    for name in os.listdir(folder):
        finished = name.removeprefix(".").removesuffix(".partial")
        stale = finished != name or finished not in current
        if stale and pattern.fullmatch(finished):
            (folder / name).unlink()


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
