"""An optimiser's step that finds its own size and its end: what the task, the engines and the loop ask of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from inference.optim.optimizers import Update

__all__ = ["RHAT", "AdaptiveOptimizer", "StopReason"]

RHAT = 1.1  # of a guide that wanders in place, at most


@dataclass(frozen=True)
class StopReason:
    """Why a fit ended, and by which figures.

    ``settled`` says that the optimisation had come to rest by its own rule, as
    ``message`` has it in words. ``rhat`` is the largest split R-hat of the guide over
    the last half of the search at one step size, ``mcse`` the largest Monte-Carlo
    standard error of its averages, in units in which a posterior standard deviation
    is 1; both None where there was no time to look, or no start to take the units
    from. ``doubts`` are what the guide's importance weights then said against it;
    ``interrupted`` is the signal that ended the fit before its time, where one did.
    """

    settled: bool
    message: str
    rhat: float | None
    mcse: float | None
    doubts: tuple[str, ...] = ()
    interrupted: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the fields by the names that archives and checkpoints hold."""
        fields = asdict(self)
        return {"settled": fields.pop("settled"), "how": fields.pop("message"), **fields}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any]) -> StopReason:
        """Return the reason whose fields were saved."""
        fields = dict(saved)
        return cls(message=fields.pop("how"), **{**fields, "doubts": tuple(fields["doubts"])})

    @property
    def converged(self) -> bool:
        """Whether it came to rest, and nothing says that it is elsewhere than at the posterior."""
        return self.settled and not self.doubts

    @property
    def rest(self) -> str:
        """How it came to rest or did not, in words, without the doubts."""
        return f"settled {self.message}" if self.settled else self.message

    @property
    def reason(self) -> str:
        """All of it in words."""
        if self.settled and self.doubts:
            return f"{self.rest}; but the guide is not the posterior: {'; '.join(self.doubts)}"
        return f"converged {self.message}" if self.settled else self.message


class AdaptiveOptimizer(Update):
    """An update from ``theta``, (P,), that takes at most ``steps`` and may lower their number when it looks.

    ``every`` are the steps between two points of the path that it wants to look
    at, None for none; ``settling`` is the step from which on they get smaller, and
    ``stop`` says at the end why that was the end.
    """

    every: int | None = None
    stop: StopReason
    settling: int
    _decided: bool

    def __init__(self, theta: Tensor, steps: int) -> None:
        super().__init__({}, 0.0)
        self.theta = theta
        self.ceiling = self.steps = steps

    @abstractmethod
    def look(self, step: int, points: list[Tensor], losses: Tensor) -> None:
        """Judge the path so far, ``points`` being θ since the last look and ``losses`` all of −ELBO; end a phase."""

    def state_dict(self) -> dict[str, Any]:
        """What the looks so far have found, as numbers and tensors, for :meth:`load_state_dict`."""
        return {
            "settling": self.settling,
            "steps": self.steps,
            "decided": self._decided,
            "stop": self.stop.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self.settling, self.steps, self._decided = saved["settling"], saved["steps"], saved["decided"]
        self.stop = StopReason.from_state_dict(saved["stop"])

    def result(self, theta: Tensor, moments: list[Tensor]) -> Tensor:
        """What the steps so far have found."""
        return theta
