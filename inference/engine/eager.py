"""The eager engine: one fused optimiser step a call of the model, over an explicit state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inference.engine.engine import EngineState, IterateRecorder
from inference.engine.svi_problem import SVIProblem
from inference.model.captured_values import changed, outside_values
from inference.model.elbo import loss, traces
from inference.model.nonfinite_sites import failure, first_failure
from inference.optim.optimizers import Updating, make_optimizer, set_step_size
from inference.utils.random_state import RandomStream

__all__ = ["EagerEngine", "EagerState"]


@dataclass
class EagerState(EngineState):
    """State of the eager engine: θ with its gradient, and an optimiser of torch over them."""

    grad: Tensor
    optimizer: Optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers and tensors, by the names that checkpoints hold."""
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set the state to the one that was saved, in place."""
        super().load_state_dict(saved)
        self.optimizer.load_state_dict(saved["optimizer"])


@dataclass(frozen=True)
class _Snapshot:
    """Copy of what :meth:`EagerEngine.advance` puts back where a step fails."""

    flat_params: Tensor
    moments: dict[Any, Any]
    random_state: dict[str, Any]

    @classmethod
    def of(cls, state: EagerState) -> _Snapshot:
        """Copy θ, the optimiser's moments and the random state."""
        moments = _copied(state.optimizer.state_dict()["state"])
        return cls(state.flat_params.detach().clone(), moments, dict(state.stream.state))

    def put_back(self, state: EagerState) -> None:
        """Set ``state`` to the copy; the count of steps is left where it is."""
        with torch.no_grad():
            state.flat_params.copy_(self.flat_params)
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": _copied(self.moments), "param_groups": groups})
        state.stream.state = dict(self.random_state)


def _copied(moments: dict[Any, Any]) -> dict[Any, Any]:
    return {key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in e.items()} for key, e in moments.items()}


class EagerEngine:
    """``init``, then ``advance`` by any number of steps, over an explicit state.

    θ is one flat tensor that every parameter is a view of, so a step is one
    backward pass into one gradient and one fused update.
    """

    name = "eager"
    keeps_iterates = False

    def __init__(self, problem: SVIProblem) -> None:
        self.problem = problem
        self.bound_model = problem.bound_model
        self.outside = {} if problem.share is None else self._outside()

    def _outside(self) -> dict[str, object]:
        args = () if self.problem.loader else self.problem.args
        return outside_values((self.problem.model, self.problem.guide, args))

    def init(self, stream: RandomStream) -> EagerState:
        """The state before the first step."""
        problem = self.problem
        flat_params = problem.begin.requires_grad_(True)
        flat_params.grad = torch.zeros_like(flat_params)
        optimizer = (
            Updating(flat_params, problem.adaptive)
            if problem.adaptive
            else make_optimizer(problem.optimizer, flat_params, problem.lr)
        )
        return EagerState(flat_params, stream, flat_params.grad, optimizer)

    def advance(self, state: EagerState, steps: int, iterates: IterateRecorder | None = None) -> Tensor:
        """Take steps as :meth:`inference.engine.engine.Engine.advance` says; ``iterates`` has θ at the end alone."""
        if self.problem.loader is not None:
            self.problem.loader.hold(state.step, steps)
        before = _Snapshot.of(state)
        losses = self._take(state, steps)
        if not (torch.isfinite(losses[:, 0]).all() and torch.isfinite(state.flat_params).all()):
            self._explain(state, before, losses[:, 0])
        state.step += steps
        if iterates is not None:
            iterates.keep(state.step, state.flat_params)
        return losses

    def state_dict(self, state: EagerState) -> dict[str, Any]:
        """Return all that changes, as numbers and tensors."""
        return state.state_dict()

    def load_state_dict(self, state: EagerState, saved: Mapping[str, Any]) -> None:
        """Set a state to the one that was saved, in place."""
        state.load_state_dict(saved)

    def result(self, state: EagerState) -> Tensor:
        """θ that the steps so far have found: their last, or an average."""
        adaptive, kept = self.problem.adaptive, state.optimizer.state[state.flat_params]
        return (
            state.flat_params
            if adaptive is None
            else adaptive.result(state.flat_params, [kept[name] for name in adaptive.moments])
        )

    def refresh(self, state: EagerState) -> None:
        """Nothing: every step reads what is there; but other processes do not, and then a change is refused."""
        if self.problem.share is not None:
            self.problem.share.refuse(changed(self.outside, self._outside()))

    def _take(self, state: EagerState, steps: int) -> Tensor:
        """Steps as they come, good or bad, with the count left where it is."""
        losses = torch.empty(steps, 2, dtype=state.flat_params.dtype, device=state.flat_params.device)
        with self.bound_model.running(state.flat_params.detach(), state.stream, state.grad), self.problem.together():
            for i in range(steps):
                losses[i] = self._step(state, state.step + i)
        return losses

    def _step(self, state: EagerState, step: int) -> Tensor:
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

    def _explain(self, state: EagerState, start: _Snapshot, losses: Tensor) -> None:
        """Put the state back to ``start``, and raise what happened in the first bad of the steps with these losses."""
        problem, good = self.problem, first_failure(losses, lambda count: self._good_after(state, start, count))
        self._good_after(state, start, good)
        flat_params, number = state.flat_params.detach().clone(), state.step + good
        stream = RandomStream(dict(state.stream.state))
        self._good_after(state, start, good + 1)
        after = state.flat_params.detach().clone()
        start.put_back(state)
        share = problem.share
        with self.bound_model.running(flat_params, stream), nullcontext() if share is None else share.drawing():
            pairs = (traces(problem.model, problem.guide, problem.args_at(number)) for _ in range(problem.particles))
            find = partial(failure, self.bound_model.params, flat_params, after, pairs, number)
            raise find() if share is None else share.agreed(find)

    def _good_after(self, state: EagerState, start: _Snapshot, steps: int) -> bool:
        """Take ``steps`` steps from ``start``, and say whether θ is finite."""
        start.put_back(state)
        self._take(state, steps)
        return bool(torch.isfinite(state.flat_params).all())
