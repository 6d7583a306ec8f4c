"""State of a fit: its restarts, the running one and those that have ended, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor

from inference.data.batch_loader import BatchLoader
from inference.engine.svi_problem import StepPlan
from inference.model.bound_model import BoundModel
from inference.optim.adaptive import StopReason
from inference.posterior import Posterior
from inference.predictive.approximation import FitRecord
from inference.storage.atomic_files import ADVICE
from inference.svi.callbacks.base import settled
from inference.svi.options import FitProblem
from inference.utils.random_state import RandomStream

__all__ = ["FitState", "Restart", "RestartResult", "RestartResults", "RestartState", "as_like", "reading"]


@contextmanager
def reading(folder: Path | None) -> Iterator[None]:
    """Raise one error that names ``folder`` if what is read inside does not have the form of a fit's state."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"the checkpoint in {folder} is damaged ({words}): {ADVICE}") from error


def as_like(saved: Tensor, here: Tensor) -> Tensor:
    """Return a saved tensor on the device of ``here``, or raise if its shape or type differs."""
    if saved.shape != here.shape or saved.dtype != here.dtype:
        raise TypeError(f"{saved.dtype} {tuple(saved.shape)} for {here.dtype} {tuple(here.shape)}")
    return saved.to(here.device)


@dataclass
class RestartResult:
    """What one restart has found: θ, (P,), losses and KL, (2, steps), and how it was found."""

    number: int
    flat_params: Tensor
    stream: RandomStream
    reported_options: dict[str, Any]
    num_evaluations: int
    history: Tensor = field(default_factory=lambda: torch.empty(2, 0))
    stop: StopReason | None = None

    @property
    def loss(self) -> float:
        """−ELBO in nats, where the restart ended."""
        return settled(self.history[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the result as numbers and tensors, by the names that checkpoints hold."""
        return {
            "number": self.number,
            "flat": self.flat_params,
            "curves": self.history,
            "stop": None if self.stop is None else self.stop.state_dict(),
            "searched": self.num_evaluations,
            "options": self.reported_options,
            "stream": self.stream.saved(),
        }

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], device: torch.device) -> RestartResult:
        """Return the result that was saved, its tensors on ``device``."""
        return cls(
            saved["number"],
            saved["flat"].to(device),
            RandomStream.restored(saved["stream"]),
            saved["options"],
            saved["searched"],
            saved["curves"].to(device),
            None if saved["stop"] is None else StopReason.from_state_dict(saved["stop"]),
        )


@dataclass
class RestartState:
    """State of the running restart: where it began, its engine, and the history of its steps so far.

    ``engine_state`` and ``step_rule_state`` are written and read by the engine and by the adaptive optimiser alone.
    """

    initial_params: Tensor
    plan: StepPlan | None
    num_evaluations: int
    engine: str
    engine_state: Mapping[str, Any]
    step_rule_state: dict[str, Any] | None
    history: Tensor
    seconds: float

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return int(self.engine_state["step"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers and tensors, by the names that checkpoints hold."""
        return {
            "theta": self.initial_params,
            "plan": None if self.plan is None else self.plan.state_dict(),
            "searched": self.num_evaluations,
            "used": self.engine,
            "engine": self.engine_state,
            "finding": self.step_rule_state,
            "curves": self.history,
            "seconds": self.seconds,
        }

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], like: Tensor) -> RestartState:
        """Return the state that was saved; θ and the losses have to be as ``like``, the parameters of the guide."""
        engine_state = saved["engine"]
        as_like(engine_state["flat"], like)
        return cls(
            as_like(saved["theta"], like),
            None if saved["plan"] is None else StepPlan.from_state_dict(saved["plan"], like),
            int(saved["searched"]),
            str(saved["used"]),
            engine_state,
            saved["finding"],
            as_like(saved["curves"], like.new_empty(2, int(engine_state["step"]))),
            saved["seconds"],
        )


@dataclass
class FitState:
    """State of a fit: −ELBO of the restarts that ended, infinite where one failed, the best, and the running one."""

    seconds: float
    losses: list[float]
    best: RestartResult | None
    running: RestartState

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers and tensors, by the names that checkpoints hold."""
        best = None if self.best is None else self.best.state_dict()
        return {"seconds": self.seconds, "running": self.running.state_dict(), "losses": self.losses, "best": best}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], like: Tensor, folder: Path) -> FitState:
        """Return the state that ``folder`` keeps of a guide with parameters as ``like``, (P,).

        Raises
        ------
        ValueError
            If the state is damaged.
        """
        with reading(folder):
            best = saved["best"]
            return cls(
                saved["seconds"] + 0.0,
                list(saved["losses"]),
                None if best is None else RestartResult.from_state_dict(best, like.device),
                RestartState.from_state_dict(saved["running"], like),
            )


@dataclass
class Restart:
    """One restart: the guide that it fits, and what it has found."""

    problem: FitProblem
    seed: int
    particles: int
    bound_model: BoundModel
    result: RestartResult

    def posterior(self, seconds: float, losses: tuple[float, ...] = ()) -> Posterior:
        """Return the posterior that was found; ``losses`` are −ELBO of all restarts."""
        return self.posterior_at(self.result.flat_params, self.result.history, seconds, losses)

    def posterior_so_far(self, seconds: float) -> Posterior | None:
        """Return the posterior after the steps so far, None before the first."""
        return self.posterior(seconds) if self.result.history.shape[1] else None

    def posterior_at(
        self, flat_params: Tensor, history: Tensor, seconds: float, losses: tuple[float, ...] = ()
    ) -> Posterior:
        """Return the posterior at θ = ``flat_params``, after steps with these losses and KL, (2, steps)."""
        result, problem = self.result, self.problem
        values, kl = history.clone().cpu().numpy()
        evaluations = result.num_evaluations + len(values) * self.particles
        record = FitRecord(values, kl, seconds, self.seed, result.reported_options, losses, evaluations, result.stop)
        bound_model, flat_params = self.bound_model, flat_params.detach()
        if isinstance(bound_model.guide, AutoLaplaceApproximation):
            bound_model, flat_params = self._laplace(bound_model.guide, flat_params)
        loader = problem.data if isinstance(problem.data, BatchLoader) else None
        return Posterior(bound_model, flat_params, problem.args, problem.argument_names, record, batches=loader)

    def _laplace(self, guide: AutoLaplaceApproximation, flat_params: Tensor) -> tuple[BoundModel, Tensor]:
        """Turn the mode that an AutoLaplaceApproximation found into its Normal."""
        bound_model, args, stream = self.bound_model, self.problem.args, self.result.stream
        with bound_model.running(flat_params, stream):
            normal = guide.laplace_approximation(*args)
            values = {f"AutoMultivariateNormal.{k}": getattr(normal, k) for k in ("loc", "scale", "scale_tril")}
        finished = BoundModel.start(
            bound_model.model, AutoMultivariateNormal(guide.model), args, stream, bound_model.device, bound_model.dtype
        )
        kept = bound_model.params.constrained(flat_params)
        return finished, finished.params.unconstrained({**kept, **values})


@dataclass
class RestartResults:
    """The restarts that have ended: −ELBO of each in nats, infinite where one failed, and the best."""

    losses: list[float] = field(default_factory=list)
    best: Restart | None = None

    def add(self, restart: Restart | None) -> None:
        """Count one more, None where it failed."""
        loss = math.inf if restart is None else restart.result.loss
        self.losses.append(loss)
        if restart is not None and (self.best is None or loss < self.best.result.loss):
            self.best = restart
