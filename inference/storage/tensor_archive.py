"""Tensors and a manifest in a folder: a kill leaves the old pair or the new one, and reading trusts neither.

``<stem>.json`` names, by size and SHA-256, the file beside it that has the
tensors. That file's name changes with its content, so the JSON is the one thing
that is replaced.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.storage.atomic_files import ADVICE, read_bytes, replacing
from inference.storage.json_document import MOST_BYTES, parsed, read_json, refuse_damage, write_json
from inference.storage.schema import SHAPE, WHOLE, check, either, list_of, mapping_of, record

__all__ = ["read", "write"]

TENSORS = "tensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_TENSOR = record(dtype=either(*_DTYPES), shape=SHAPE, data_offsets=list_of(WHOLE))
_ALIGNED = 8  # bytes, the widest number
_MOST = 2**30  # bytes of all tensors together
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


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
    parts = _serialized(tensors)
    size = sum(map(len, parts))
    if size > _MOST:
        raise ValueError(f"{stem} would have {size:,} bytes of tensors, and at most {_MOST:,} are read: keep less")
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    name = _file_name(stem, digest.hexdigest())
    entry = {"file": name, "bytes": size, "sha256": digest.hexdigest()}
    try:
        with replacing(folder / name) as partial, partial.open("xb") as file:
            file.writelines(parts)
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
    """What :func:`write` was given.

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
            refuse_damage(file, hashlib.sha256(raw).hexdigest(), entry["sha256"])
            return _deserialized(file, raw), manifest


def _entry(path: Path, stem: str, entry: Any) -> dict[str, Any]:
    """What the JSON says of the tensors' file, whose name leads nowhere else."""
    found = entry if isinstance(entry, dict) else {}
    digest, size = found.get("sha256"), found.get("bytes")
    named = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    if not named or found.get("file") != _file_name(stem, str(digest)) or type(size) is not int or size < 0:
        raise ValueError(f"{path} names no file of tensors that write() could have written: {ADVICE}")
    return found


def _file_name(stem: str, digest: str) -> str:
    return f"{stem}-{digest[:16]}.safetensors"


def _serialized(tensors: Mapping[str, Tensor]) -> list[Any]:
    """The bytes of a safetensors file in parts, of which contiguous tensors on the CPU are not copied.

    Wide types come first, so that each tensor starts at a multiple of its width.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise TypeError(f"tensor {name!r} is {tensor.dtype}, which is not kept: turn it into {list(_CODES)[1]}")
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, start = {}, 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNED)
    if len(text) > MOST_BYTES:
        raise ValueError(f"the names and shapes of {len(tensors):,} tensors take {len(text):,} bytes: keep fewer")
    values = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for _, tensor in ordered)
    return [len(text).to_bytes(8, "little"), text, *(value.data for value in values)]


def _deserialized(path: Path, raw: bytearray) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the memory of ``raw``: they lie one behind the other and fill it."""
    length = int.from_bytes(raw[:8], "little")
    if not length <= min(MOST_BYTES, len(raw) - 8) or length % _ALIGNED:
        raise ValueError(f"{path} is damaged (its header would have {length:,} bytes): {ADVICE}")
    header = parsed(path, raw[8 : 8 + length])
    check(path, header, mapping_of(_TENSOR))
    tensors, end = {}, 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = end, end + math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
        if entry["data_offsets"] != [begin - 8 - length, end - 8 - length] or end > len(raw):
            raise ValueError(f"{path} is damaged (tensor {name!r} does not lie where it should): {ADVICE}")
        try:
            tensors[name] = _tensor(_DTYPES[entry["dtype"]], entry["shape"], memoryview(raw)[begin:end])
        except RuntimeError as error:
            raise ValueError(f"{path} is damaged (tensor {name!r} has an impossible shape): {ADVICE}") from error
    if end != len(raw):
        raise ValueError(f"{path} is damaged (its tensors end at byte {end:,} of {len(raw):,}): {ADVICE}")
    return tensors


def _tensor(dtype: torch.dtype, shape: list[int], data: memoryview) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _tidy(folder: Path, stem: str) -> None:
    """Remove what is left of the stem's earlier files, and of writes that were cut off."""
    pattern = re.compile(rf"{re.escape(stem)}-[0-9a-f]{{16}}\.safetensors")
    path = folder / f"{stem}.json"
    current = read_bytes(path, MOST_BYTES).decode() if path.exists() else ""
    for name in os.listdir(folder):
        finished = name.removeprefix(".").removesuffix(".partial")
        stale = finished != name or finished not in current
        if stale and pattern.fullmatch(finished):
            (folder / name).unlink()
