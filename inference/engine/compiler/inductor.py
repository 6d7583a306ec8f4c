"""Graphs of torch operators as C++ kernels and the order in which to call them, by TorchInductor.

Inductor fuses operators into kernels and writes a Python program that calls
them. :func:`lower` keeps that program from being compiled and loaded, runs it
once on zeros with recorders in place of the kernels, and so learns which kernel
works on which piece of memory. The result, :class:`Lowered`, no longer needs
Python: every buffer has a fixed place in one block.

This is the one module that names ``torch._inductor``, none of which is public.
A canary in ``tests/engine/compiler/test_inductor.py`` fails when one of the
entry points has moved.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from inference.engine.tracing.traced_graph import DispatchMode, native_code

__all__ = [
    "PREFIX",
    "Call",
    "Lowered",
    "NotCompilable",
    "View",
    "compiler_command",
    "fuse",
    "lower",
    "machine",
    "no_compiler",
]

PREFIX = "torch/csrc/inductor/cpp_prefix.h"  # what Inductor's kernels include
_ALIGNMENT = 64


class NotCompilable(ValueError):
    """Reason why this machine or this version of torch cannot compile a graph."""


@dataclass(frozen=True)
class View:
    """A tensor of the program: its piece of memory, and how it lies there (in elements; ``start`` in bytes).

    Slots from 0 are the program's inputs, the next slot is its scratch memory,
    and the slots after it are tensors that operators of torch return.
    """

    slot: int
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One call: of a fused kernel by its number, or of an operator of torch by its name.

    ``cpp`` is the C++ of an operator that has some. Its results then lie in the
    program's own memory; those of other operators lie wherever torch puts them.
    """

    kernel: int | None
    operator: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    results: tuple[tuple[int, View], ...] = ()
    cpp: str | None = None


@dataclass(frozen=True)
class Lowered:
    """Kernels in C++, the calls in order, the bytes of scratch memory, and where the first output lies."""

    kernels: tuple[str, ...]
    calls: tuple[Call, ...]
    scratch: int
    slots: int
    output: View


def lower(module: fx.GraphModule, examples: Sequence[Tensor], threads: int = 1) -> Lowered:
    """Fuse ``module`` into kernels for ``threads`` threads, and plan one run of them over fixed memory.

    Raises
    ------
    NotCompilable
        If Inductor refuses the graph, or writes code of another form than is known here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, which say nothing about the model
            source = _inductor_source(module, examples, threads)
        return _Planner(source, examples).plan()
    except NotCompilable:
        raise
    except Exception as error:  # Inductor raises whatever it meets
        problem = str(error).strip().splitlines()
        raise NotCompilable(f"TorchInductor: {type(error).__name__}: {problem[0] if problem else ''}") from error


def fuse(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Return ``module`` as Inductor compiles it for the device of the inputs: by Triton on a GPU.

    Raises
    ------
    NotCompilable
        With the reason.
    """
    from torch._inductor import compile as inductor_compile

    try:
        with torch.no_grad():
            return inductor_compile(module, list(inputs))
    except Exception as error:  # Inductor raises whatever it meets
        raise NotCompilable(f"TorchInductor: {type(error).__name__}: {error}") from error


def _inductor_source(module: fx.GraphModule, examples: Sequence[Tensor], threads: int) -> str:
    """Return the Python program with the kernels' C++ in it that Inductor writes for a graph.

    Inductor has no way to ask for the text alone: it compiles and loads what it wrote. So the method that does this
    is replaced by one that keeps the text. Constants that Inductor makes would be lost with it, and are refused.
    """
    from torch._inductor import compile as inductor_compile
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    class Nothing:
        def call(self, args: Any) -> None:
            """Do nothing, in place of the module that is not loaded."""

    def keep_source(self: Any) -> Nothing:
        if self.constants:
            raise NotCompilable(f"TorchInductor made constants of its own: {list(self.constants)}")
        sources.append(self.codegen()[0].value)
        return Nothing()

    with torch.no_grad(), _settings(threads), mock.patch.object(GraphLowering, "compile_to_module", keep_source):
        inductor_compile(module, list(examples))
    if len(sources) != 1:
        raise NotCompilable(f"TorchInductor wrote {len(sources)} programs for one graph")
    return sources[0]


@contextmanager
def _settings(threads: int = 1, check_instructions: bool = False) -> Iterator[None]:
    from torch._inductor import config

    with config.patch(
        {
            "fx_graph_cache": False,  # a hit would skip the writing of the text; results are kept by ``cache``
            "cpp_wrapper": False,
            "fallback_random": True,  # torch's own generators, so that both engines draw the same numbers
            "compile_threads": 1,  # more would start processes, for a compilation that does not happen
            "cpp.threads": threads,
            # The test of the instruction set compiles and starts Python: seconds, for what the real compile shows.
            "cpp.vec_isa_ok": None if check_instructions else True,
        }
    ):
        yield


class _Planner(DispatchMode):
    """Run the Python that Inductor wrote around its kernels once, on zeros, and note what it calls on which memory.

    Three things are noted: a kernel, by a function that stands in its place; a new buffer, by a stand-in for torch's
    ``empty_strided_cpu``; and an operator of torch that no kernel covers, by the dispatch mode. A tensor is known by
    the address of its storage. Addresses are used again once a storage is gone, so a weak reference to the storage
    says if an entry is still about the same one.
    """

    def __init__(self, source: str, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self.source = source
        self.examples = list(examples)
        self.kernels: list[str] = []
        self.calls: list[Call] = []
        self.places: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self.memory = _Memory()
        self.scratch_slot = len(self.examples)
        self.slots = self.scratch_slot + 1

    def plan(self) -> Lowered:
        """Return the kernels, and every call with the memory it works on."""
        namespace: dict[str, Any] = {"__name__": "planned"}
        with mock.patch("torch._inductor.async_compile.AsyncCompile", self._collector()):
            exec(compile(self.source, "<inductor>", "exec"), namespace)  # noqa: S102 - written by torch, just now
        namespace["empty_strided_cpu"] = self._allocate
        for i, example in enumerate(self.examples):
            self._place(example, i, -example.storage_offset() * example.element_size())
        with torch.no_grad(), self:
            outputs = namespace["call"](list(self.examples))
        if not isinstance(outputs[0], Tensor):
            raise NotCompilable("the loss is not a tensor")
        output = self._view(outputs[0])
        return Lowered(tuple(self.kernels), tuple(self.calls), self.memory.size, self.slots, output)

    def _collector(self) -> Any:
        planner = self

        class Collector:
            def cpp_pybinding(self, types: Any, source: str) -> Any:
                if source not in planner.kernels:
                    planner.kernels.append(source)
                number = planner.kernels.index(source)

                def note(*args: Any) -> None:
                    if not all(isinstance(arg, Tensor) for arg in args):
                        raise NotCompilable("a kernel takes more than tensors")
                    planner.calls.append(Call(number, None, tuple(planner._view(arg) for arg in args)))

                return note

            def wait(self, scope: Any) -> None:
                """Return at once: nothing was started."""

        return Collector

    def _allocate(self, shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        """Return a buffer of zeros that has a place in the scratch memory.

        All of its storage is set to zero, gaps between strides too, as the operators of torch run on it for real: an
        uninitialised number could be an index that leads nowhere.
        """
        with _disable_current_modes():
            value = torch.empty_strided(shape, stride, dtype=dtype)
            torch.as_strided(value, (value.untyped_storage().nbytes() // value.element_size(),), (1,), 0).zero_()
        self._place(value, self.scratch_slot, self.memory.take(value))
        return value

    def _place(self, value: Tensor, slot: int, start: int) -> None:
        storage = value.untyped_storage()
        self.places[storage.data_ptr()] = (StorageWeakRef(storage), slot, start)

    def _placed(self, value: Tensor) -> tuple[int, int] | None:
        found = self.places.get(value.untyped_storage().data_ptr())
        return None if found is None or found[0].expired() else found[1:]

    def _view(self, value: Tensor) -> View:
        place = self._placed(value)
        if place is None:
            raise NotCompilable("a tensor appeared from nowhere")
        start = place[1] + int(value.storage_offset()) * value.element_size()
        return View(place[0], start, tuple(value.shape), tuple(value.stride()), value.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NotCompilable("the program reads a number back in the middle of a step")
        given, named = tree_map(lambda v: self._view(v) if isinstance(v, Tensor) else v, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        parts = [part for part in tree_leaves(out) if isinstance(part, Tensor)]
        cpp = native_code(func)
        if cpp is not None and _are_plain([*args, *parts]):
            for part in parts:
                self._place(part, self.scratch_slot, self.memory.take(part))
            results = tuple((i, self._view(part)) for i, part in enumerate(parts))
            self.calls.append(Call(None, str(func), tuple(given), {}, results, cpp))
            return out
        fresh = [i for i, part in enumerate(parts) if self._placed(part) is None]
        if not fresh and not func._schema.is_mutable:
            return out  # a view of known memory: its strides are in the calls that use it
        for i in fresh:
            self._place(parts[i], self.slots, 0)
            self.slots += 1
        results = tuple((i, self._view(parts[i])) for i in fresh)
        self.calls.append(Call(None, str(func), tuple(given), named, results))
        return out


def _are_plain(values: Sequence[Any]) -> bool:
    """Return True if all are contiguous tensors of one float type, as an operator's own C++ expects."""
    kinds = {value.dtype if isinstance(value, Tensor) and value.is_contiguous() else None for value in values}
    return len(kinds) == 1 and kinds <= {torch.float32, torch.float64}


class _Memory:
    """Places for buffers in one block; the place of a buffer is free again once the buffer is gone.

    Inductor's Python deletes each buffer after its last use, so the lifetimes that are seen in the planning run are
    those of every run. A small block stays in the processor's cache.
    """

    def __init__(self) -> None:
        self.size = 0
        self.taken: list[tuple[StorageWeakRef, int, int]] = []

    def take(self, value: Tensor) -> int:
        """Return the first byte of a place for ``value`` that overlaps no living buffer: the first gap that fits."""
        storage = value.untyped_storage()
        need = -(-max(storage.nbytes(), 1) // _ALIGNMENT) * _ALIGNMENT
        self.taken = [entry for entry in self.taken if not entry[0].expired()]
        start = 0
        for _, begin, end in sorted(self.taken, key=lambda entry: entry[1]):
            if begin - start >= need:
                break
            start = max(start, end)
        self.taken.append((StorageWeakRef(storage), start, start + need))
        self.size = max(self.size, start + need)
        return start


def compiler_command(
    source: Path, name: str, folder: Path, check_instructions: bool = False, precompiling: bool = False
) -> list[str]:
    """Return torch's own command to compile C++ that holds Inductor's kernels, or the header that they include.

    ``check_instructions`` asks the compiler, by a compilation, which of the processor's instructions it knows.

    Raises
    ------
    NotCompilable
        If there is no C++ compiler.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    with _settings(check_instructions=check_instructions):
        try:
            options = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False, precompiling=precompiling)
            builder = CppBuilder(name=name, sources=str(source), output_dir=str(folder), BuildOption=options)
            command = shlex.split(builder.get_command_line())
            if shutil.which(command[0]) is None:
                raise FileNotFoundError(command[0])
        except (InvalidCxxCompiler, OSError) as error:
            raise no_compiler(error) from error
    # Torch brings an OpenMP along. With the system's there would be two pools of threads that fight over the cores.
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp-*.so*"))
    if bundled:
        command = [str(bundled[0]) if argument == "-lgomp" else argument for argument in command]
    return [*command, "-w", "-g0"]


def no_compiler(error: Exception) -> NotCompilable:
    """Return the error for a machine without a C++ compiler."""
    return NotCompilable(f"no C++ compiler was found ({error}): install g++ or clang, or set CXX")


def machine() -> str:
    """Return what a compiled program depends on besides its text: torch, the processor's instructions, the compiler."""
    instructions = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(flags|Features)\s*:.*$", cpuinfo.read_text(), re.MULTILINE)
        instructions = found.group(0) if found else instructions
    parts = (torch.__version__, platform.machine(), instructions, os.environ.get("CXX", ""))
    return "\n".join(str(part) for part in parts)
