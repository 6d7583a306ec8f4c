"""The eager engine: one fused optimiser step a call of the model, over an explicit state."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inference.engine.iterates import Pauses
from inference.engine.svi_problem import Task
from inference.model.captured_values import changed, outside_values
from inference.model.elbo import loss, traces
from inference.model.nonfinite_sites import failure, first_failure
from inference.optim.functional import Updating
from inference.optim.optimizers import make_optimizer, set_step_size
from inference.utils.random_state import RandomStream

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

    def __init__(self, task: Task) -> None:
        self.task = task
        self.program = task.program
        self.outside = {} if task.share is None else self._outside()

    def _outside(self) -> dict[str, object]:
        args = () if self.task.batches else self.task.args
        return outside_values((self.task.model, self.task.guide, args))

    def init(self, stream: RandomStream) -> SVIState:
        """The state before the first step."""
        task = self.task
        flat = task.begin.requires_grad_(True)
        flat.grad = torch.zeros_like(flat)
        optimizer = Updating(flat, task.landing) if task.landing else make_optimizer(task.optimizer, flat, task.lr)
        return SVIState(flat, flat.grad, optimizer, stream)

    def advance(self, state: SVIState, steps: int, pauses: Pauses | None = None) -> Tensor:
        """Take ``steps`` steps in place and return what :func:`~inference.model.elbo.loss` was in each, (steps, 2).

        Of ``pauses`` there is one, at the end.

        Raises
        ------
        NonFinite
            At the first loss or gradient that is not finite, naming the step, the
            site and the parameter; the state is put back to where this call began.
        """
        if self.task.batches is not None:
            self.task.batches.hold(state.step, steps)
        before = _snapshot(state)
        losses = self._take(state, steps)
        if not (torch.isfinite(losses[:, 0]).all() and torch.isfinite(state.flat).all()):
            self._explain(state, before, losses[:, 0])
        state.step += steps
        if pauses is not None:
            pauses.keep(state.step, state.flat)
        return losses

    def saved(self, state: SVIState) -> dict[str, Any]:
        """All that changes, as numbers and tensors, for :meth:`restore`."""
        return {
            "step": state.step,
            "flat": state.flat,
            "optimizer": state.optimizer.state_dict(),
            "stream": state.stream.saved(),
        }

    def restore(self, state: SVIState, saved: dict[str, Any]) -> None:
        """Bring a state to what was saved, in place."""
        with torch.no_grad():
            state.flat.copy_(saved["flat"])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.stream.state = RandomStream.restored(saved["stream"]).state
        state.step = saved["step"]

    def result(self, state: SVIState) -> Tensor:
        """θ that the steps so far have found: their last, or an average."""
        landing, kept = self.task.landing, state.optimizer.state[state.flat]
        return state.flat if landing is None else landing.result(state.flat, [kept[name] for name in landing.moments])

    def refresh(self, state: SVIState) -> None:
        """Nothing: every step reads what is there; but other processes do not, and then a change is refused."""
        if self.task.share is not None:
            self.task.share.refuse(changed(self.outside, self._outside()))

    def _take(self, state: SVIState, steps: int) -> Tensor:
        """Steps as they come, good or bad, with the count left where it is."""
        losses = torch.empty(steps, 2, dtype=state.flat.dtype, device=state.flat.device)
        with self.program.running(state.flat.detach(), state.stream, state.grad), self.task.together():
            for i in range(steps):
                losses[i] = self._step(state, state.step + i)
        return losses

    def _step(self, state: SVIState, step: int) -> Tensor:
        state.grad.zero_()
        task = self.task
        if task.landing is None:
            set_step_size(state.optimizer, task.lr, step)
        beta = task.anneal(step) if task.anneal else None
        share, args, scored = task.share, task.args_at(step), bool(self.program.scored)
        with nullcontext() if share is None else share.drawing():
            value = loss(task.model, task.guide, args, task.particles, not scored, beta, task.sticking)
        learns = value.requires_grad
        if learns:
            value[0].backward()
        if share is not None:
            grad, value = share.total(state.grad, value)
            state.grad.copy_(grad)
        if learns:
            state.optimizer.step()
        return value.detach()

    def _explain(self, state: SVIState, start: _Snapshot, losses: Tensor) -> None:
        """Put the state back to ``start``, and raise what happened in the first bad of the steps with these losses."""
        task, good = self.task, first_failure(losses, lambda count: self._good_after(state, start, count))
        self._good_after(state, start, good)
        flat, number = state.flat.detach().clone(), state.step + good
        stream = RandomStream(dict(state.stream.state))
        self._good_after(state, start, good + 1)
        after = state.flat.detach().clone()
        _roll_back(state, start)
        share = task.share
        with self.program.running(flat, stream), nullcontext() if share is None else share.drawing():
            pairs = (traces(task.model, task.guide, task.args_at(number)) for _ in range(task.particles))
            find = partial(failure, self.program.params, flat, after, pairs, number)
            raise find() if share is None else share.agreed(find)

    def _good_after(self, state: SVIState, start: _Snapshot, steps: int) -> bool:
        """Take ``steps`` steps from ``start``, and say whether θ is finite."""
        _roll_back(state, start)
        self._take(state, steps)
        return bool(torch.isfinite(state.flat).all())


_Snapshot = tuple[Tensor, dict[str, Any], dict[str, Any]]


def _snapshot(state: SVIState) -> _Snapshot:
    moments = {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        for key, entry in state.optimizer.state_dict()["state"].items()
    }
    return state.flat.detach().clone(), moments, dict(state.stream.state)


def _roll_back(state: SVIState, snapshot: _Snapshot) -> None:
    flat, moments, stream = snapshot
    with torch.no_grad():
        state.flat.copy_(flat)
    groups = state.optimizer.state_dict()["param_groups"]
    copies = {key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in e.items()} for key, e in moments.items()}
    state.optimizer.load_state_dict({"state": copies, "param_groups": groups})
    state.stream.state = dict(stream)
