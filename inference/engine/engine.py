"""Parts that all engines share: the protocol, the state that they advance, and the recorder of its iterates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from inference.engine.svi_problem import SVIProblem
from inference.utils.random_state import RandomStream

__all__ = ["Engine", "EngineState", "IterateRecorder"]


@dataclass
class IterateRecorder:
    """``until(step)`` is the next step to keep; ``kept`` are step, time by ``perf_counter`` and θ of those reached."""

    until: Callable[[int], int]
    kept: list[tuple[int, float, Tensor]] = field(default_factory=list)

    def keep(self, step: int, flat_params: Tensor) -> None:
        """Copy θ as it is after ``step`` steps."""
        self.kept.append((step, time.perf_counter(), flat_params.detach().clone()))


@dataclass
class EngineState:
    """All that changes while an engine runs: θ, (P,), the random stream, the number of steps, and what engines add."""

    flat_params: Tensor
    stream: RandomStream
    step: int = field(default=0, kw_only=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers and tensors, by the names that checkpoints hold."""
        return {"step": self.step, "flat": self.flat_params, "stream": self.stream.saved()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set the state to the one that was saved, in place."""
        stream = RandomStream.restored(saved["stream"])
        with torch.no_grad():
            self.flat_params.copy_(saved["flat"])
        self.stream.state, self.step = stream.state, saved["step"]


class Engine(Protocol):
    """What ``fit`` needs of an engine, beside the :class:`EngineState` that it makes.

    ``keeps_iterates`` says whether θ can be kept within a call of :meth:`advance`, not at its end alone.
    """

    name: str
    keeps_iterates: bool
    problem: SVIProblem

    def advance(self, state: Any, steps: int, iterates: IterateRecorder | None = None) -> Tensor:
        """Take ``steps`` steps in place and return what :func:`~inference.model.elbo.loss` was in each, (steps, 2).

        On the way θ is kept at the steps that ``iterates`` wants.

        Raises
        ------
        NonFinite
            At the first loss or gradient that is not finite, naming the step, the
            site and the parameter; the state is put back to where this call began.
        """

    def result(self, state: Any) -> Tensor:
        """Return θ that the steps so far have found."""

    def refresh(self, state: Any) -> None:
        """Look again at what callbacks may have changed."""

    def state_dict(self, state: Any) -> dict[str, Any]:
        """Return all that changes in a state, as numbers and tensors."""

    def load_state_dict(self, state: Any, saved: Mapping[str, Any]) -> None:
        """Set a state to the one that was saved, in place."""
