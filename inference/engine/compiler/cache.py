"""Compiled steps kept in the user's cache folder, so that the next process need not compile them again.

An entry is a folder with the library and its plan. It is named by a hash of
all that decides on the compiled code, among it the text of the modules that
write that code: whoever changes them makes new entries, never wrong ones.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, fx

from inference.engine.compiler import cpp_build, cpp_codegen, inductor
from inference.engine.compiler.executable import Executable, ExecutionPlan
from inference.engine.compiler.inductor import Call, NotCompilable, View
from inference.engine.tracing.traced_graph import graph_text, native_code
from inference.storage.atomic_files import cache_folder, is_private, keep_newest, read_bytes
from inference.storage.json_document import read_json, write_json

__all__ = ["executable"]

_KEPT = 256
_WAIT = 300.0  # seconds for another process that compiles
_LIBRARY, _PLAN, _SCHEMA = "step.so", "plan.json", 1
_MOST_BYTES = 2**28  # of a library
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def executable(module: fx.GraphModule, inputs: Sequence[Tensor], rows: Sequence[int], threads: int = 1) -> Executable:
    """Return ``module`` compiled and bound to ``inputs``, from the cache if it was compiled before.

    ``rows`` are the inputs that advance by one row a step. The cache is
    ``$XDG_CACHE_HOME/kiln/programs`` (``~/.cache`` by default), a folder that
    only the user can write to or replace, as it holds code that is run; the name of an
    entry is a hash of the graph, the inputs' shapes and types, torch, the
    processor, the number of threads and the modules that write the code. A
    checksum over plan, library and name guards each from damage, as a wrong
    place in memory would not be noticed.

    Raises
    ------
    NotCompilable
        With the reason.
    """
    key = _key(module, inputs, rows, threads)
    cache = cache_folder("programs")
    if cache is None:
        return _made(None, key, module, inputs, rows, threads)
    found = _found(cache / key, key, inputs, threads)
    if found is not None:
        return found
    with _only_one(key):
        return _found(cache / key, key, inputs, threads) or _made(cache, key, module, inputs, rows, threads)


@contextmanager
def _only_one(key: str) -> Iterator[None]:
    """Let one process at a time into the block, so that those which start together compile a program once.

    A lock that cannot be had in time is no reason to fail: the program is then compiled twice.
    """
    locks = cache_folder("locks")
    with ExitStack() as stack:
        if locks is not None:
            with suppress(Timeout, OSError):
                stack.enter_context(FileLock(locks / f"{key[:2]}.lock", timeout=_WAIT))
        yield


def _found(entry: Path, key: str, inputs: Sequence[Tensor], threads: int) -> Executable | None:
    """Return what an entry holds, bound to ``inputs``; None unless its files are the user's own and whole."""
    files = (entry / _LIBRARY, entry / _PLAN)
    if not all(is_private(path) for path in (entry, *files)):
        return None
    try:
        found = read_json(files[1], _SCHEMA, ("key", "library", "plan"))
        library = hashlib.sha256(read_bytes(files[0], _MOST_BYTES)).hexdigest()
        if (found["key"], found["library"]) != (key, library):
            return None
        os.utime(entry)
        plan: ExecutionPlan = _decoded(found["plan"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Executable(files[0], plan, inputs, threads)


def _made(
    cache: Path | None,
    key: str,
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    rows: Sequence[int],
    threads: int,
) -> Executable:
    """Compile in a folder of its own, and move the result into the cache if there is one."""
    with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as name:
        folder = Path(name)
        plan = _build(folder, key, module, inputs, rows, threads)
        library = folder / _LIBRARY
        if cache is not None:
            library = _keep(folder, cache / key) / _LIBRARY
            keep_newest(cache, _KEPT)
        return Executable(library, plan, inputs, threads)


def _build(
    folder: Path, key: str, module: fx.GraphModule, inputs: Sequence[Tensor], rows: Sequence[int], threads: int
) -> ExecutionPlan:
    # ``lower`` knows a tensor by its storage, and rows of several inputs may lie in one: each example is a copy.
    examples = [value.detach().clone() if i in rows else value for i, value in enumerate(inputs)]
    with cpp_build.precompiled() as header:
        lowered = inductor.lower(module, examples, threads)
        widths = [(i, inputs[i].nbytes) for i in rows]
        text, parts = cpp_codegen.source(lowered, widths)
        code = folder / "step.cpp"
        code.write_text(text, encoding="utf-8")
        cpp_build.build(code, folder / _LIBRARY, header())
    plan = ExecutionPlan(tuple(parts), tuple(rows), len(inputs), lowered.slots, lowered.scratch, lowered.output)
    digest = hashlib.sha256((folder / _LIBRARY).read_bytes()).hexdigest()
    write_json(folder / _PLAN, {"key": key, "library": digest, "plan": _encoded(plan)}, _SCHEMA)
    return plan


def _key(module: fx.GraphModule, inputs: Sequence[Tensor], rows: Sequence[int], threads: int) -> str:
    shapes = [f"{tuple(v.shape)} {v.stride()} {v.dtype}" for v in inputs]
    ours = [Path(m.__file__ or "").read_text(encoding="utf-8") for m in (inductor, cpp_codegen)]
    ours.append(cpp_codegen.PRELUDE)
    brought = [native_code(node.target) or "" for node in module.graph.nodes]
    parts = [inductor.machine(), f"{threads} threads", graph_text(module.graph), *shapes, str(list(rows)), *ours]
    parts += [text for text in brought if text]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:40]


def _keep(folder: Path, entry: Path) -> Path:
    """Move what was built into the cache in one step; if another process was first, its entry stays."""
    shutil.rmtree(entry, ignore_errors=True)  # an entry that could not be loaded
    staged = Path(tempfile.mkdtemp(dir=entry.parent, prefix="staged-"))
    for name in (_LIBRARY, _PLAN):
        shutil.copyfile(folder / name, staged / name)
        (staged / name).chmod(0o600)
    try:
        staged.rename(entry)
    except OSError:
        shutil.rmtree(staged, ignore_errors=True)
        return folder
    return entry


def _encoded(value: Any) -> Any:
    """Return plans, calls and views as JSON, each with its kind."""
    if isinstance(value, ExecutionPlan | Call | View):
        fields = {name: _encoded(getattr(value, name)) for name in value.__dataclass_fields__}
        return {"kind": type(value).__name__, "value": fields}
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return {"kind": type(value).__name__, "value": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"kind": "dict", "value": {name: _encoded(part) for name, part in value.items()}}
    if isinstance(value, list | tuple):
        return [_encoded(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"kind": "float", "value": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise NotCompilable(f"an operator takes a {type(value).__name__}")


def _decoded(value: Any) -> Any:
    """Return what was encoded. A name of torch's is looked up, and has to be of the type that the text says."""
    if isinstance(value, list):
        return tuple(_decoded(part) for part in value)
    if not isinstance(value, dict):
        return value
    kind, content = value["kind"], value["value"]
    if kind in ("device", "float"):
        return {"device": torch.device, "float": float}[kind](content)
    if kind in _NAMED:
        named = getattr(torch, content)
        if not isinstance(named, _NAMED[kind]):
            raise ValueError(f"torch.{content} is no {kind}")
        return named
    fields = {name: _decoded(part) for name, part in content.items()}
    return {"ExecutionPlan": ExecutionPlan, "Call": Call, "View": View, "dict": dict}[kind](**fields)
