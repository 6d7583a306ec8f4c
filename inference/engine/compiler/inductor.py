"""A graph of torch operators as C++ kernels and the order to call them in, by TorchInductor.

This is the one module that touches torch's private entry points;
tests/test_programs.py holds the canary that says when one of them has moved.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
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
    "build",
    "header_command",
    "lower",
    "machine",
]

PREFIX = "torch/csrc/inductor/cpp_prefix.h"  # what Inductor's kernels include
_ALIGNMENT = 64


class NotCompilable(ValueError):
    """Why this machine or this torch cannot compile a graph."""


@dataclass(frozen=True)
class View:
    """A tensor of the program: which piece of memory, and how it lies there (in elements; ``start`` in bytes).

    Slots from 0 are the program's inputs, the slot after them is its scratch
    memory, those after that are what operators return.
    """

    slot: int
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One thing to do: a fused kernel by its number, or an operator of torch by its name.

    ``cpp`` is the C++ that an operator brought along; its results then lie in
    the program's own memory, otherwise wherever the operator puts them.
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
    """Let Inductor fuse ``module`` into kernels for ``threads`` threads, and plan one run of them over fixed memory.

    Raises
    ------
    NotCompilable
        If Inductor refuses the graph, or writes code of another form than is known here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's to itself
            source = _inductor_source(module, examples, threads)
        return _Planner(source, examples).plan()
    except NotCompilable:
        raise
    except Exception as error:  # Inductor raises whatever it meets
        problem = str(error).strip().splitlines()
        raise NotCompilable(f"TorchInductor: {type(error).__name__}: {problem[0] if problem else ''}") from error


def _inductor_source(module: fx.GraphModule, examples: Sequence[Tensor], threads: int) -> str:
    from torch._inductor import compile as inductor_compile
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    class Nothing:
        def call(self, args: Any) -> None:
            """Stand for the module that is not loaded."""

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
            "fx_graph_cache": False,
            "cpp_wrapper": False,
            "fallback_random": True,
            "compile_threads": 1,
            "cpp.threads": threads,
            # The test of the instruction set compiles and starts Python: seconds, for what the real compile shows.
            "cpp.vec_isa_ok": None if check_instructions else True,
        }
    ):
        yield


class _Planner(DispatchMode):
    """Run the Python that Inductor wrote around its kernels once, on zeros, and note what it calls on which memory."""

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
        """The kernels, and every call with the memory it works on."""
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
                return lambda *args: planner._note_kernel(number, args)

            def wait(self, scope: Any) -> None:
                """Nothing was started."""

        return Collector

    def _note_kernel(self, number: int, args: tuple[Any, ...]) -> None:
        if not all(isinstance(arg, Tensor) for arg in args):
            raise NotCompilable("a kernel takes more than tensors")
        self.calls.append(Call(number, None, tuple(self._view(arg) for arg in args)))

    def _allocate(self, shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
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
        given, named = tree_map(self._described, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        parts = [part for part in tree_leaves(out) if isinstance(part, Tensor)]
        cpp = native_code(func)
        if cpp is not None and _plain([*args, *parts]):
            self._note_native(func, cpp, given, parts)
            return out
        fresh = [i for i, part in enumerate(parts) if self._placed(part) is None]
        if not fresh and not func._schema.is_mutable:
            return out  # a view of what is known already
        for i in fresh:
            self._place(parts[i], self.slots, 0)
            self.slots += 1
        results = tuple((i, self._view(parts[i])) for i in fresh)
        self.calls.append(Call(None, str(func), tuple(given), named, results))
        return out

    def _note_native(self, func: Any, cpp: str, given: Any, parts: list[Tensor]) -> None:
        for part in parts:
            self._place(part, self.scratch_slot, self.memory.take(part))
        results = tuple((i, self._view(part)) for i, part in enumerate(parts))
        self.calls.append(Call(None, str(func), tuple(given), {}, results, cpp))

    def _described(self, value: Any) -> Any:
        return self._view(value) if isinstance(value, Tensor) else value


def _plain(values: Sequence[Any]) -> bool:
    """Whether all are contiguous tensors of one float type."""
    kinds = {value.dtype if isinstance(value, Tensor) and value.is_contiguous() else None for value in values}
    return len(kinds) == 1 and kinds <= {torch.float32, torch.float64}


class _Memory:
    """Places for buffers in one block, taken again once a buffer is gone."""

    def __init__(self) -> None:
        self.size = 0
        self.taken: list[tuple[StorageWeakRef, int, int]] = []

    def take(self, value: Tensor) -> int:
        """The first byte of a place for ``value`` that overlaps no living buffer."""
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


def build(source: Path, library: Path, header: Path | None = None) -> None:
    """Compile a C++ file that holds Inductor's kernels, with a ``header`` compiled by :func:`header_command` if any.

    Raises
    ------
    NotCompilable
        If there is no C++ compiler, or it fails.
    """
    try:
        failure = _compile(source, library, header)
        if failure is not None and header is not None:  # not one that this compiler can use
            failure = _compile(source, library)
        if failure is not None:  # a compiler older than the processor: ask it what it knows
            failure = _compile(source, library, check_instructions=True)
    except OSError as error:
        raise _no_compiler(error) from error
    if failure is not None:
        raise NotCompilable(f"the C++ compiler failed: {failure}")


def header_command(header: Path, folder: Path) -> list[str]:
    """What compiles ``header`` into ``folder``, for :func:`build` once the result lies beside the header.

    Raises
    ------
    NotCompilable
        If there is no C++ compiler.
    """
    return _command(header, header.name, folder, precompiling=True)


def _compile(source: Path, library: Path, header: Path | None = None, check_instructions: bool = False) -> str | None:
    command = _command(source, library.stem, library.parent, check_instructions)
    command += ["-o", str(library)]
    if header is not None:
        command[1:1] = ["-include", str(header)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - torch's own command
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return (errors or done.stderr.splitlines() or ["no message"])[0]


def _command(
    source: Path, name: str, folder: Path, check_instructions: bool = False, precompiling: bool = False
) -> list[str]:
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
            raise _no_compiler(error) from error
    return [*map(_torch_openmp, command), "-w", "-g0"]


def _no_compiler(error: Exception) -> NotCompilable:
    return NotCompilable(f"no C++ compiler was found ({error}): install g++ or clang, or set CXX")


def _torch_openmp(argument: str) -> str:
    """The OpenMP that torch brings along in place of the system's: two pools of threads fight over the cores."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp-*.so*"))
    return str(bundled[0]) if argument == "-lgomp" and bundled else argument


def machine() -> str:
    """What a compiled program depends on beside its source: torch, the processor's instructions, the compiler."""
    instructions = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(flags|Features)\s*:.*$", cpuinfo.read_text(), re.MULTILINE)
        instructions = found.group(0) if found else instructions
    parts = (torch.__version__, platform.machine(), instructions, os.environ.get("CXX", ""))
    return "\n".join(str(part) for part in parts)
