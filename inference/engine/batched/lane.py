"""One fit on its way among others that run in the same program."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inference.engine.batched.stacked_step import TracedFit
from inference.engine.svi_problem import SVIProblem
from inference.engine.tracing.random_ops import ReplayRandomOps
from inference.model.elbo import loss
from inference.optim.functional import Update
from inference.utils.errors import NonFinite
from inference.utils.random_state import RandomStream, environment

__all__ = ["CHUNK", "GLOBALS", "Lane"]

CHUNK = 100  # steps between two looks
GLOBALS = threading.Lock()  # around what uses the process-wide random numbers, defaults or parameters
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of two ways to compute a loss, relative


@dataclass
class Lane:
    """One fit on its way among others: what it is to do, and what it has found so far.

    It takes ``steps``, fewer where its rule says so. ``flat_params`` is θ, (P,), that it
    ended with, ``curves`` are its losses and KL, (2, steps taken), and ``error``,
    or ``interrupted`` by a signal, why it ended before its time, if it did. One
    that ``strayed`` found another first loss than its own model and guide do: the
    step that was recorded of another fit is not its own.
    """

    problem: SVIProblem
    update: Update
    stream: RandomStream
    recording: TracedFit
    steps: int
    flat_params: Tensor = field(default_factory=lambda: torch.empty(0))
    error: NonFinite | None = None
    ended: bool = False
    interrupted: str | None = None
    strayed: bool = False
    _begun: dict[str, Any] = field(default_factory=dict)
    _losses: list[Tensor] = field(default_factory=list)
    _points: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begun = dict(self.stream.state)

    @property
    def curves(self) -> Tensor:
        """Losses and KL of all steps so far, (2, steps)."""
        if len(self._losses) > 1:
            self._losses = [torch.cat(self._losses)]
        return self._losses[0].T if self._losses else torch.empty(2, 0)

    @property
    def every(self) -> int | None:
        """The steps between two points of the path that its rule looks at."""
        return None if self.problem.adaptive is None else self.problem.adaptive.every

    @property
    def rates_key(self) -> Hashable:
        """What fits share whose rates are the same at every step."""
        adaptive = self.problem.adaptive
        if adaptive is None:
            return id(self.update)
        return type(adaptive), adaptive.settling, adaptive.steps, getattr(adaptive, "size", None)

    def noise(self, steps: int, stream: RandomStream | None = None) -> list[Tensor]:
        """Its next random numbers, of its own or of another stream."""
        bound_model = self.problem.bound_model
        with GLOBALS, (stream or self.stream).drawing(), environment(bound_model.device, bound_model.dtype):
            return self.recording.step.noise(steps)

    def check(self, first: Tensor, noise: list[Tensor]) -> None:
        """Compare the first loss, (2,), with what model and guide themselves make of the same noise."""
        problem, bound_model = self.problem, self.problem.bound_model
        beta = problem.anneal(0) if problem.anneal else None
        own = []
        with GLOBALS, bound_model.running(problem.begin, RandomStream(dict(self.stream.state))), torch.no_grad():
            for values in self.recording.step.replayed(noise, 0):
                with ReplayRandomOps(values):
                    own.append(
                        loss(problem.model, problem.guide, problem.args, 1, True, beta, problem.sticking_the_landing)
                    )
        mean = torch.stack(own).mean(0).to(first.dtype)
        close = _CLOSE[mean.dtype] * (1 + mean.abs().nan_to_num().max())
        if mean.isfinite().all() and not torch.allclose(mean, first, rtol=0, atol=float(close)):
            self.strayed = self.ended = True
            self.stream.state = self._begun

    def take(self, losses: Tensor, step: int, state: list[Tensor]) -> None:
        """Count the losses and KL of the steps up to ``step``, (n, 2), after which θ and moments are ``state``."""
        self._losses.append(losses.clone())
        if self.every and step % self.every == 0:
            self._points.append(state[0].clone())
        if step % CHUNK and step != self.steps:
            return
        adaptive = self.problem.adaptive
        if adaptive is not None:
            with GLOBALS:
                adaptive.look(step, self._points, self.curves[0])
            self._points, self.steps = [], adaptive.steps
        if step >= self.steps:
            self.end(state)

    def lose(self, losses: Tensor) -> None:
        """Count the losses of the good steps before one that failed, (n, 2)."""
        self._losses.append(losses.clone())

    def end(self, state: list[Tensor], error: NonFinite | None = None) -> None:
        """Keep what θ and the moments say as the result."""
        flat_params, *moments = state
        adaptive = self.problem.adaptive
        self.flat_params = (flat_params if adaptive is None else adaptive.result(flat_params, moments)).clone()
        self.error, self.ended = error, True
