"""Compiled steps bound to memory: ``run`` takes one step for each row that it is given.

:class:`Executable` calls a library of compiled C++, :class:`ReplayedStep` a CUDA
graph. Both change the state of the fit in place and return the losses, so that
nothing but losses passes through Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from inference.engine.compiler.inductor import Call, View, fuse

__all__ = ["Executable", "ExecutionPlan", "ReplayedStep"]

_ALIGNMENT = 64  # bytes: a vector of the processor, and a line of its cache
_WARM_UP = 3  # runs before a CUDA graph is recorded, as torch's notes on CUDA graphs ask for


@dataclass(frozen=True)
class ExecutionPlan:
    """What has to be known of a compiled library to run it.

    ``parts`` are its functions by number and the calls of torch between them;
    ``rows`` the inputs that advance by a row a step; ``output`` is the loss.
    """

    parts: tuple[int | Call, ...]
    rows: tuple[int, ...]
    inputs: int
    slots: int
    scratch: int
    output: View


@contextmanager
def _at_most(threads: int) -> Iterator[None]:
    """Limit the threads of torch and its BLAS: those of a small product wait for each other longer than they work."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Executable:
    """A library and a plan bound to tensors: ``run`` takes steps, changing the state among the inputs in place.

    ``inputs`` are kept, as the library works on their memory; those that
    advance are examples of one row here, and each ``run`` is given their rows.
    No more than ``threads`` threads work on a step, those of BLAS included.
    """

    def __init__(self, library: Path, plan: ExecutionPlan, inputs: Sequence[Tensor], threads: int) -> None:
        self.plan = plan
        self._threads = threads
        self._functions = ctypes.CDLL(str(library))
        self._native = all(isinstance(part, int) for part in plan.parts)
        # Buffers begin at multiples of the alignment within the block, so the block has to begin at one itself.
        block = torch.zeros(plan.scratch + _ALIGNMENT, dtype=torch.uint8)
        skipped = -block.data_ptr() % _ALIGNMENT
        self._memory: dict[int, Tensor] = dict(enumerate(inputs))
        self._memory[plan.inputs] = block[skipped : skipped + plan.scratch]
        self._table = (ctypes.c_void_p * plan.slots)()
        for slot, value in self._memory.items():
            self._table[slot] = value.data_ptr()
        self._parts = [] if self._native else [self._bound(part) for part in plan.parts]

    def run(self, rows: Sequence[Tensor]) -> Tensor:
        """Take one step for each row and return the losses, (steps, 2).

        ``rows`` are contiguous (steps, numbers a step), in the order of ``plan.rows``.
        """
        losses = torch.empty(len(rows[0]), *self.plan.output.shape, dtype=self.plan.output.dtype)
        with _at_most(self._threads):
            if not self._native:
                return self._run_in_parts(rows, losses)
            for slot, value in zip(self.plan.rows, rows, strict=True):
                self._table[slot] = value.data_ptr()
            self._functions.run(self._table, ctypes.c_long(len(losses)), ctypes.c_void_p(losses.data_ptr()))
        return losses

    def _run_in_parts(self, rows: Sequence[Tensor], losses: Tensor) -> Tensor:
        """Take the steps in Python, for a program in which torch makes some of the calls.

        Rows are copied to the example's memory: the tensors of the calls are bound to it, so that a pointer that moves
        would be seen by the compiled parts alone.
        """
        with torch.no_grad():
            for i in range(len(losses)):
                for slot, value in zip(self.plan.rows, rows, strict=True):
                    self._memory[slot].copy_(value[i])
                for part in self._parts:
                    part()
                losses[i] = self._tensor(self.plan.output)
        return losses

    def _bound(self, part: int | Call) -> Callable[[], object]:
        """Return a function that runs one part of a step.

        Tensors of the inputs and of scratch memory stay where they are, and are made once. What an operator returns
        lies elsewhere at each step: its address goes into the table, and tensors on it are made for each call.
        """
        if isinstance(part, int):
            return partial(getattr(self._functions, f"part_{part}"), self._table)
        namespace, name, overload = str(part.operator).split(".")
        function = getattr(getattr(getattr(torch.ops, namespace), name), overload)

        def fixed(value: Any) -> Any:
            return self._tensor(value) if isinstance(value, View) and value.slot <= self.plan.inputs else value

        args, kwargs = tree_map(fixed, (list(part.args), part.kwargs))
        moving = any(isinstance(leaf, View) for leaf in tree_leaves((args, kwargs)))

        def call() -> None:
            given, named = args, kwargs
            if moving:
                given, named = tree_map(lambda v: self._tensor(v) if isinstance(v, View) else v, (args, kwargs))
            leaves = [leaf for leaf in tree_leaves(function(*given, **named)) if isinstance(leaf, Tensor)]
            for i, view in part.results:
                self._memory[view.slot] = leaves[i]
                self._table[view.slot] = leaves[i].data_ptr()

        return call

    def _tensor(self, view: View) -> Tensor:
        """Return the tensor of a view; scratch memory consists of bytes, and is first seen as numbers of its dtype."""
        base, start = self._memory[view.slot], view.start
        if view.slot == self.plan.inputs:
            size = view.dtype.itemsize
            end = start + (len(base) - start) // size * size
            base, start = base[start:end].view(view.dtype), 0
        offset = base.storage_offset() + start // view.dtype.itemsize
        return torch.as_strided(base, view.shape, view.stride, offset)


class ReplayedStep:
    """A step on a GPU: ``run`` takes one step for each row, changing the state among the inputs in place.

    The kernels of a step are recorded once as a CUDA graph and then replayed,
    which starts all of them with one call. A graph always works on the same
    memory, so the rows of a chunk are copied to fixed buffers, and a counter that
    lives on the GPU says which row is next: a replay needs nothing from the host,
    and nothing is read back inside a chunk.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], rows: Sequence[int], most: int) -> None:
        self._inputs = list(inputs)
        self._rows = list(rows)
        self._chunks = [
            torch.zeros(most, *inputs[i].shape, dtype=inputs[i].dtype, device=inputs[i].device) for i in rows
        ]
        self._counter = torch.zeros(1, dtype=torch.long, device=inputs[0].device)
        self._losses = torch.zeros(most, 2, dtype=inputs[0].dtype, device=inputs[0].device)
        # On a CPU, where this class is only tested, the step runs as it is.
        self._step = fuse(module, inputs) if inputs[0].is_cuda else module
        self._replay = self._recorded() if inputs[0].is_cuda else self._once

    def run(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the losses, (steps, 2); ``rows`` are (steps, …), in the order of the constructor's ``rows``."""
        steps = len(rows[0])
        for chunk, given in zip(self._chunks, rows, strict=True):
            chunk[:steps].copy_(given)
        self._counter.zero_()
        for _ in range(steps):
            self._replay()
        return self._losses[:steps].clone()

    def _once(self) -> None:
        values = list(self._inputs)
        for slot, chunk in zip(self._rows, self._chunks, strict=True):
            values[slot] = chunk.index_select(0, self._counter)[0]
        with torch.no_grad():
            loss = self._step(*values)[0]
            self._losses.index_copy_(0, self._counter, loss.reshape(1, 2))
            self._counter.add_(1)

    def _recorded(self) -> Callable[[], object]:
        """Record the kernels of one step as a graph, and return the function that replays it.

        The runs that warm up, and the recording, work on the state itself, so it is put back afterwards.
        """
        before = [value.clone() for value in self._inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._counter.zero_()
                self._once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._counter.zero_()
        with torch.cuda.graph(graph):
            self._once()
        for value, saved in zip(self._inputs, before, strict=True):
            value.copy_(saved)
        return graph.replay
