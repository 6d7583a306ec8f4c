"""The eager engine: one fused optimiser step a call of the model, over an explicit state."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inference.engine.iterates import IterateRecorder
from inference.engine.svi_problem import SVIProblem
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

    flat_params: Tensor
    grad: Tensor
    optimizer: Optimizer
    stream: RandomStream
    step: int = 0


class EagerEngine:
    """``init``, then ``advance`` by any number of steps, over an explicit state.

    θ is one flat tensor that every parameter is a view of, so a step is one
    backward pass into one gradient and one fused update.
    """

    def __init__(self, problem: SVIProblem) -> None:
        self.problem = problem
        self.bound_model = problem.bound_model
        self.outside = {} if problem.share is None else self._outside()

    def _outside(self) -> dict[str, object]:
        args = () if self.problem.loader else self.problem.args
        return outside_values((self.problem.model, self.problem.guide, args))

    def init(self, stream: RandomStream) -> SVIState:
        """The state before the first step."""
        problem = self.problem
        flat_params = problem.begin.requires_grad_(True)
        flat_params.grad = torch.zeros_like(flat_params)
        optimizer = (
            Updating(flat_params, problem.adaptive)
            if problem.adaptive
            else make_optimizer(problem.optimizer, flat_params, problem.lr)
        )
        return SVIState(flat_params, flat_params.grad, optimizer, stream)

    def advance(self, state: SVIState, steps: int, iterates: IterateRecorder | None = None) -> Tensor:
        """Take ``steps`` steps in place and return what :func:`~inference.model.elbo.loss` was in each, (steps, 2).

        Of ``iterates`` there is one, at the end.

        Raises
        ------
        NonFinite
            At the first loss or gradient that is not finite, naming the step, the
            site and the parameter; the state is put back to where this call began.
        """
        if self.problem.loader is not None:
            self.problem.loader.hold(state.step, steps)
        before = _snapshot(state)
        losses = self._take(state, steps)
        if not (torch.isfinite(losses[:, 0]).all() and torch.isfinite(state.flat_params).all()):
            self._explain(state, before, losses[:, 0])
        state.step += steps
        if iterates is not None:
            iterates.keep(state.step, state.flat_params)
        return losses

    def saved(self, state: SVIState) -> dict[str, Any]:
        """All that changes, as numbers and tensors, for :meth:`restore`."""
        return {
            "step": state.step,
            "flat": state.flat_params,
            "optimizer": state.optimizer.state_dict(),
            "stream": state.stream.saved(),
        }

    def restore(self, state: SVIState, saved: dict[str, Any]) -> None:
        """Bring a state to what was saved, in place."""
        with torch.no_grad():
            state.flat_params.copy_(saved["flat"])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.stream.state = RandomStream.restored(saved["stream"]).state
        state.step = saved["step"]

    def result(self, state: SVIState) -> Tensor:
        """θ that the steps so far have found: their last, or an average."""
        adaptive, kept = self.problem.adaptive, state.optimizer.state[state.flat_params]
        return (
            state.flat_params
            if adaptive is None
            else adaptive.result(state.flat_params, [kept[name] for name in adaptive.moments])
        )

    def refresh(self, state: SVIState) -> None:
        """Nothing: every step reads what is there; but other processes do not, and then a change is refused."""
        if self.problem.share is not None:
            self.problem.share.refuse(changed(self.outside, self._outside()))

    def _take(self, state: SVIState, steps: int) -> Tensor:
        """Steps as they come, good or bad, with the count left where it is."""
        losses = torch.empty(steps, 2, dtype=state.flat_params.dtype, device=state.flat_params.device)
        with self.bound_model.running(state.flat_params.detach(), state.stream, state.grad), self.problem.together():
            for i in range(steps):
                losses[i] = self._step(state, state.step + i)
        return losses

    def _step(self, state: SVIState, step: int) -> Tensor:
        state.grad.zero_()
        problem = self.problem
        if problem.adaptive is None:
            set_step_size(state.optimizer, problem.lr, step)
        beta = problem.anneal(step) if problem.anneal else None
        share, args, score_function_sites = (
            problem.share,
            problem.args_at(step),
            bool(self.bound_model.score_function_sites),
        )
        with nullcontext() if share is None else share.drawing():
            value = loss(
                problem.model,
                problem.guide,
                args,
                problem.particles,
                not score_function_sites,
                beta,
                problem.sticking_the_landing,
            )
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
        problem, good = self.problem, first_failure(losses, lambda count: self._good_after(state, start, count))
        self._good_after(state, start, good)
        flat_params, number = state.flat_params.detach().clone(), state.step + good
        stream = RandomStream(dict(state.stream.state))
        self._good_after(state, start, good + 1)
        after = state.flat_params.detach().clone()
        _roll_back(state, start)
        share = problem.share
        with self.bound_model.running(flat_params, stream), nullcontext() if share is None else share.drawing():
            pairs = (traces(problem.model, problem.guide, problem.args_at(number)) for _ in range(problem.particles))
            find = partial(failure, self.bound_model.params, flat_params, after, pairs, number)
            raise find() if share is None else share.agreed(find)

    def _good_after(self, state: SVIState, start: _Snapshot, steps: int) -> bool:
        """Take ``steps`` steps from ``start``, and say whether θ is finite."""
        _roll_back(state, start)
        self._take(state, steps)
        return bool(torch.isfinite(state.flat_params).all())


_Snapshot = tuple[Tensor, dict[str, Any], dict[str, Any]]


def _snapshot(state: SVIState) -> _Snapshot:
    moments = {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        for key, entry in state.optimizer.state_dict()["state"].items()
    }
    return state.flat_params.detach().clone(), moments, dict(state.stream.state)


def _roll_back(state: SVIState, snapshot: _Snapshot) -> None:
    flat_params, moments, stream = snapshot
    with torch.no_grad():
        state.flat_params.copy_(flat_params)
    groups = state.optimizer.state_dict()["param_groups"]
    copies = {key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in e.items()} for key, e in moments.items()}
    state.optimizer.load_state_dict({"state": copies, "param_groups": groups})
    state.stream.state = dict(stream)
