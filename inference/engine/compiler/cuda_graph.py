"""A step on a GPU: its kernels recorded once as a CUDA graph and replayed, with nothing read back inside a chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from inference.engine.compiler.inductor import NotCompilable

__all__ = ["ReplayedStep"]

_WARM_UP = 3  # runs before the recording, as torch's notes on CUDA graphs ask for


class ReplayedStep:
    """``run`` takes one step for each row, changing the state among the inputs in place.

    The row of each step is picked on the device by a counter that lives there,
    so that a replay needs nothing from the host.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], rows: Sequence[int], most: int) -> None:
        self._inputs = list(inputs)
        self._rows = list(rows)
        self._chunks = [
            torch.zeros(most, *inputs[i].shape, dtype=inputs[i].dtype, device=inputs[i].device) for i in rows
        ]
        self._counter = torch.zeros(1, dtype=torch.long, device=inputs[0].device)
        self._losses = torch.zeros(most, 2, dtype=inputs[0].dtype, device=inputs[0].device)
        self._step = _fused(module, inputs)
        self._replay = self._recorded() if inputs[0].is_cuda else self._once

    def run(self, rows: Sequence[Tensor]) -> Tensor:
        """The losses, shape (steps, 2); ``rows`` are (steps, …), in the order given at the start."""
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
        """The kernels of one step as a graph; the runs before it leave the state as it was."""
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


def _fused(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The step by Inductor's Triton kernels on a GPU; as it is on a CPU, where this class is only tested."""
    if not inputs[0].is_cuda:
        return module
    from torch._inductor import compile as inductor_compile

    try:
        with torch.no_grad():
            return inductor_compile(module, list(inputs))
    except Exception as error:  # Inductor raises whatever it meets
        raise NotCompilable(f"TorchInductor: {type(error).__name__}: {error}") from error
