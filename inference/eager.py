"""The eager engine: one fused optimiser step a call of the model, over an explicit state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inference.arguments import row_count
from inference.isolation import RandomStream
from inference.minibatch import MiniBatch
from inference.objective import loss, traces
from inference.optimizers import LearningRate, make_optimizer, set_step_size
from inference.program import Program
from inference.sites import refuse_non_finite

__all__ = ["EagerEngine", "SVIState"]


@dataclass
class SVIState:
    """All that changes while a fit runs: θ, its gradient, the optimiser and the random stream."""

    flat: Tensor
    grad: Tensor
    optimizer: Optimizer
    stream: RandomStream
    step: int = 0


class EagerEngine:
    """``init``, then ``advance`` by any number of steps, over an explicit state.

    θ is one flat tensor that every parameter is a view of, so a step is one
    backward pass into one gradient and one fused update.
    """

    def __init__(
        self,
        program: Program,
        args: tuple[Any, ...],
        *,
        optimizer: str | Callable[..., Optimizer] = "adam",
        lr: LearningRate = 0.01,
        particles: int = 1,
        batch_size: int | None = None,
    ) -> None:
        self.program = program
        self.args = args
        self.optimizer = optimizer
        self.lr = lr
        self.particles = particles
        self.batch = MiniBatch(_rows(args), batch_size) if batch_size is not None else None
        self.model = program.model if self.batch is None else self.batch(program.model)
        self.guide = program.guide if self.batch is None else self.batch(program.guide)

    def init(self, stream: RandomStream) -> SVIState:
        """The state before the first step."""
        flat = self.program.params.flatten().requires_grad_(True)
        flat.grad = torch.zeros_like(flat)
        self._check_batch(flat.detach(), stream)
        return SVIState(flat, flat.grad, make_optimizer(self.optimizer, flat, self.lr), stream)

    def _check_batch(self, flat: Tensor, stream: RandomStream) -> None:
        if self.batch is None:
            return
        with self.program.running(flat, RandomStream(dict(stream.state))):
            traces(self.model, self.guide, self.args)
        self.batch.require_use()

    def advance(self, state: SVIState, steps: int) -> Tensor:
        """Take ``steps`` steps in place and return their losses (−ELBO in nats), shape (steps,).

        Raises
        ------
        ValueError
            At the first loss that is not finite, naming the step and the site;
            the state is put back to where this call began.
        """
        before = _snapshot(state)
        losses = torch.empty(steps, dtype=state.flat.dtype, device=state.flat.device)
        with self.program.running(state.flat.detach(), state.stream, state.grad):
            for i in range(steps):
                losses[i] = self._step(state, state.step + i)
        if not torch.isfinite(losses).all():
            bad = int((~torch.isfinite(losses)).nonzero()[0])
            _roll_back(state, before)
            self._explain(state, bad)
        state.step += steps
        return losses

    def _step(self, state: SVIState, step: int) -> Tensor:
        state.grad.zero_()
        set_step_size(state.optimizer, self.lr, step)
        value = loss(self.model, self.guide, self.args, self.particles, self.program.reparameterized)
        if value.requires_grad:
            value.backward()
            state.optimizer.step()
        return value.detach()

    def _explain(self, state: SVIState, steps: int) -> None:
        """Replay ``steps`` good steps, then look at each site of the one that failed."""
        start = _snapshot(state)
        where = f"at step {state.step + steps}"
        try:
            with self.program.running(state.flat.detach(), state.stream, state.grad):
                for i in range(steps):
                    self._step(state, state.step + i)
                for _ in range(self.particles):
                    refuse_non_finite(*traces(self.model, self.guide, self.args), where)
        finally:
            _roll_back(state, start)
        raise ValueError(f"the loss is not finite {where}: use a smaller lr= or look for overflow in the model")


def _rows(args: tuple[Any, ...]) -> int:
    rows = row_count(args)
    if rows is None:
        raise ValueError("batch_size needs data with rows, but no argument is an array: leave batch_size out")
    return rows


def _snapshot(state: SVIState) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    moments = {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        for key, entry in state.optimizer.state_dict()["state"].items()
    }
    return state.flat.detach().clone(), moments, dict(state.stream.state)


def _roll_back(state: SVIState, snapshot: tuple[Tensor, dict[str, Any], dict[str, Any]]) -> None:
    flat, moments, stream = snapshot
    with torch.no_grad():
        state.flat.copy_(flat)
    groups = state.optimizer.state_dict()["param_groups"]
    copies = {key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in e.items()} for key, e in moments.items()}
    state.optimizer.load_state_dict({"state": copies, "param_groups": groups})
    state.stream.state = dict(stream)
