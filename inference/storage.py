"""A posterior on disk: parameters in safetensors, everything else in JSON, never pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from inference.params import Params

__all__ = [
    "MANIFEST",
    "assemble",
    "describe",
    "make_folder",
    "placeholder",
    "read",
    "replacing",
    "versions",
    "write",
    "write_json",
]

SCHEMA = 1
MANIFEST = "posterior.json"
TENSORS = "posterior.safetensors"
TRACES = ("losses", "kl")
PARAM = "param:"
REQUIRED = {
    "schema",
    "model",
    "guide",
    "dtype",
    "arguments",
    "seconds",
    "seed",
    "options",
    "starts",
    "evaluations",
    "stop",
}


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: metadata.version(name) for name in ("kiln-ppl", "pyro-ppl", "torch", "numpy", "arviz")}


def describe(name: str, value: Any) -> dict[str, Any]:
    """What is kept of an argument of the fit: shape and type of a tensor, never its values."""
    if isinstance(value, Tensor):
        return {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return {"name": name, "value": value}
    return {"name": name, "object": type(value).__name__}


def placeholder(entry: dict[str, Any], folder: Path) -> Any:
    """A stand-in of the right shape for an argument, enough to set a guide up."""
    if "shape" in entry:
        return torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
    if "value" in entry:
        return entry["value"]
    raise ValueError(
        f"{folder} was fitted with {entry['name']} a {entry.get('object')}, which is not saved: pass the data to load()"
    )


def write(folder: Path, pieces: dict[str, Tensor], traces: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    """Write both files: a new folder whole or not at all, in an old one each file, the manifest last."""
    tensors = {PARAM + name: value.detach().cpu().numpy().copy() for name, value in pieces.items()}
    tensors |= {name: value.numpy() for name, value in traces.items()}
    content = {"schema": SCHEMA, "versions": versions(), **manifest}
    if folder.exists():
        with replacing(folder / TENSORS) as partial:
            save_file(tensors, partial)
        write_json(folder / MANIFEST, content)
        return folder
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        save_file(tensors, partial / TENSORS)
        (partial / MANIFEST).write_text(_json(content), encoding="utf-8")
    return folder


def make_folder(folder: Path) -> None:
    """Make ``folder`` if it is not there.

    Raises
    ------
    OSError
        If nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}): give a folder that can") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, so that ``path`` is either the old file or the whole new one, or a new folder."""
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(_json(content), encoding="utf-8")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Parameters (unconstrained), the traces ``losses`` and ``kl``, and the manifest of a saved posterior."""
    for name in (MANIFEST, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a saved posterior: it has no {name}; give the folder of save()")
    manifest = read_manifest(folder / MANIFEST)
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged ({error}): fit again, or take it from a backup") from error
    missing = [name for name in TRACES if name not in tensors]
    if missing:
        raise ValueError(f"{folder / TENSORS} has no {missing[0]!r}: it was not written by save()")
    traces = {name: tensors.pop(name) for name in TRACES}
    return {name.removeprefix(PARAM): value for name, value in tensors.items()}, traces, manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The JSON beside the parameters, with its schema and keys checked."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): fit again, or take it from a backup") from error
    missing = REQUIRED - set(manifest) if isinstance(manifest, dict) else REQUIRED
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}: it was not written by save()")
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {manifest['schema']!r}, this version reads {SCHEMA}: update kiln-ppl")
    return manifest


def assemble(folder: Path, params: Params, pieces: dict[str, Tensor]) -> Tensor:
    """The flat vector of ``params`` out of the saved ``pieces``, or a ValueError that names what differs."""
    wanted = {name: tuple(leaf.shape) for name, leaf in zip(params.names, params.leaves, strict=True)}
    found = {name: tuple(value.shape) for name, value in pieces.items()}
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
    dtype = params.leaves[0].dtype
    return torch.cat([pieces[name].to(dtype).reshape(-1) for name in params.names])
