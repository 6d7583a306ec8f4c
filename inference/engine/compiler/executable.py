"""A compiled step in memory: where its inputs lie, and the loop over steps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from inference.engine.compiler.inductor import Call, View

__all__ = ["Executable", "ExecutionPlan"]

_ALIGNMENT = 64


@dataclass(frozen=True)
class ExecutionPlan:
    """What a compiled library does not say of itself.

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
    """Torch and its BLAS with so many threads: those of a small product wait for each other longer than they work."""
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

    ``inputs`` are kept for good; the graph's rows are given as examples of one
    row here, and to each ``run`` as many as there are steps. No more than
    ``threads`` work on it, those of BLAS included.
    """

    def __init__(self, library: Path, plan: ExecutionPlan, inputs: Sequence[Tensor], threads: int) -> None:
        self.plan = plan
        self._threads = threads
        self._functions = ctypes.CDLL(str(library))
        self._native = all(isinstance(part, int) for part in plan.parts)
        block = torch.zeros(plan.scratch + _ALIGNMENT, dtype=torch.uint8)
        skipped = -block.data_ptr() % _ALIGNMENT
        self._memory: dict[int, Tensor] = dict(enumerate(inputs))
        self._memory[plan.inputs] = block[skipped : skipped + plan.scratch]
        self._table = (ctypes.c_void_p * plan.slots)()
        for slot, value in self._memory.items():
            self._table[slot] = value.data_ptr()
        self._parts = [] if self._native else [self._bound(part) for part in plan.parts]

    def run(self, rows: Sequence[Tensor]) -> Tensor:
        """Take one step for each row; the losses, shape (steps, 2).

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
        with torch.no_grad():
            for i in range(len(losses)):
                for slot, value in zip(self.plan.rows, rows, strict=True):
                    self._memory[slot].copy_(value[i])
                for part in self._parts:
                    part()
                losses[i] = self._tensor(self.plan.output)
        return losses

    def _bound(self, part: int | Call) -> Callable[[], object]:
        if isinstance(part, int):
            return partial(getattr(self._functions, f"part_{part}"), self._table)
        namespace, name, overload = str(part.operator).split(".")
        function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        args, kwargs = tree_map(self._fixed, (list(part.args), part.kwargs))
        moving = any(isinstance(leaf, View) for leaf in tree_leaves((args, kwargs)))

        def call() -> None:
            given, named = tree_map(self._resolved, (args, kwargs)) if moving else (args, kwargs)
            leaves = [leaf for leaf in tree_leaves(function(*given, **named)) if isinstance(leaf, Tensor)]
            for i, view in part.results:
                self._memory[view.slot] = leaves[i]
                self._table[view.slot] = leaves[i].data_ptr()

        return call

    def _fixed(self, value: Any) -> Any:
        """Views of memory that stays where it is, as tensors; the rest as it is."""
        return self._tensor(value) if isinstance(value, View) and value.slot <= self.plan.inputs else value

    def _resolved(self, value: Any) -> Any:
        return self._tensor(value) if isinstance(value, View) else value

    def _tensor(self, view: View) -> Tensor:
        base, start = self._memory[view.slot], view.start
        if view.slot == self.plan.inputs:
            size = view.dtype.itemsize
            end = start + (len(base) - start) // size * size
            base, start = base[start:end].view(view.dtype), 0
        offset = base.storage_offset() + start // view.dtype.itemsize
        return torch.as_strided(base, view.shape, view.stride, offset)
