"""One restart of a fit: its steps on an engine, watched by callbacks and kept in a checkpoint, and why they ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from inference.engine.batched.grouping import PreparedRestart
from inference.engine.batched.runner import Lane
from inference.engine.engine import Engine, EngineState
from inference.engine.process_group import ProcessGroup
from inference.engine.selection import choose
from inference.engine.svi_problem import SVIProblem
from inference.optim.adaptive import StopReason
from inference.svi.callbacks.base import CallbackRunner
from inference.svi.options import FitOptions, FitProblem
from inference.svi.state import FitState, Restart, RestartResult, RestartResults, RestartState, reading
from inference.svi.training_loop import CheckpointWriter, run_steps
from inference.utils.errors import NonFinite
from inference.utils.random_state import RandomStream

__all__ = ["RestartRunner"]

_ASIDE = 2**20  # the number of the random stream of steps that are no part of the record


@dataclass(frozen=True)
class RestartRunner:
    """Takes the steps of one restart at a time.

    ``results`` are those of the restarts before, which a checkpoint keeps too, and
    ``seconds()`` the time since the fit began.
    """

    problem: FitProblem
    options: FitOptions
    group: ProcessGroup | None
    results: RestartResults
    seconds: Callable[[], float]

    def run(self, prepared: PreparedRestart, resumed: RestartState | None = None) -> Restart:
        """Take the steps of a restart, or those after the ones of a ``resumed`` one.

        Raises
        ------
        NonFinite, OSError
            With the posterior so far, if a loss is not finite or the checkpoint cannot be written.
        """
        options, problem = self.options, prepared.problem
        engine, state = self._choose(self._engine_name(resumed), problem, prepared.stream)
        restart = self._restart(prepared, state.flat_params, state.stream, engine.name)
        steps = problem.adaptive.steps if problem.adaptive else options.steps
        callbacks = CallbackRunner(
            *(options.callbacks, steps, problem.bound_model.params, restart.posterior_at),
            (prepared.number + 1, options.restarts),
        )
        if resumed is not None:
            self._load(engine, state, callbacks, resumed)
        kept = options.checkpoint_folder if self.group is None or self.group.leads else None
        writer = CheckpointWriter(kept, partial(self._state, engine, state, callbacks, prepared))
        label = f"fit {prepared.number + 1}/{options.restarts}" if options.restarts > 1 else "fit"
        try:
            signal = run_steps(
                engine, state, problem.bound_model, callbacks, label, progress=options.progress, writer=writer
            )
            writer.keep()
        except (NonFinite, OSError) as error:
            restart.result.flat_params, restart.result.history = engine.result(state), callbacks.curves
            error.posterior = restart.posterior_so_far(self.seconds())  # type: ignore[union-attr]
            if isinstance(error, NonFinite):
                writer.keep(failed=True)
            raise
        restart.result.flat_params, restart.result.history = engine.result(state), callbacks.curves
        restart.result.stop = self._stop_reason(restart, prepared, signal, callbacks.steps)
        return restart

    def from_lane(self, prepared: PreparedRestart, lane: Lane) -> Restart:
        """Return what a restart has found that ran together with others."""
        restart = self._restart(prepared, lane.flat_params, lane.stream, "compiled")
        restart.result.history = lane.curves
        if lane.error is not None:
            lane.error.posterior = restart.posterior_so_far(self.seconds())
            raise lane.error
        restart.result.stop = self._stop_reason(restart, prepared, lane.interrupted, lane.steps)
        return restart

    def iterate_after(self, problem: SVIProblem, steps: int) -> Tensor:
        """Return θ after ``steps`` steps that are not part of the record."""
        stream = RandomStream.seeded(self.options.seed, _ASIDE)
        engine, state = self._choose(self.options.engine, problem, stream)
        engine.advance(state, steps)
        return engine.result(state).detach().clone()

    def _choose(self, name: str, problem: SVIProblem, stream: RandomStream) -> tuple[Engine, Any]:
        options = self.options
        return choose(name, problem, stream, options.steps * options.restarts, options.progress)

    def _restart(self, prepared: PreparedRestart, flat_params: Tensor, stream: RandomStream, engine: str) -> Restart:
        problem = prepared.problem
        searched = {"lr": "found", "optimizer": "auto"} if problem.adaptive else {}
        reported = {**self.options.report(), **self.problem.report(), **searched, "engine": engine}
        result = RestartResult(prepared.number, flat_params, stream, reported, prepared.num_evaluations)
        return Restart(self.problem, self.options.seed, self.options.particles, problem.bound_model, result)

    def _engine_name(self, resumed: RestartState | None) -> str:
        """Return the engine to choose: that of the steps so far, if there are any."""
        if resumed is None:
            return self.options.engine
        used = resumed.engine
        if self.options.engine not in ("auto", used):
            raise ValueError(f"the checkpoint is of the {used} engine, which draws other numbers: pass engine={used!r}")
        return used

    def _load(self, engine: Engine, state: EngineState, callbacks: CallbackRunner, resumed: RestartState) -> None:
        """Bring the adaptive optimiser, the engine and the callbacks to where the restart stood."""
        adaptive, kept = engine.problem.adaptive, self.options.checkpoint_folder
        with reading(kept.folder if kept else None):
            if adaptive is not None:
                adaptive.load_state_dict(resumed.step_rule_state or {})
                callbacks.steps = adaptive.steps
            engine.load_state_dict(state, resumed.engine_state)
            callbacks.resume(resumed.history, resumed.seconds)

    def _state(
        self, engine: Engine, state: EngineState, callbacks: CallbackRunner, prepared: PreparedRestart
    ) -> dict[str, Any]:
        """Return all that the fit needs to go on, as numbers and tensors."""
        adaptive, best = engine.problem.adaptive, self.results.best
        running = RestartState(
            initial_params=prepared.plain.begin,
            plan=prepared.plan,
            num_evaluations=prepared.num_evaluations,
            engine=engine.name,
            engine_state=engine.state_dict(state),
            step_rule_state=None if adaptive is None else adaptive.state_dict(),
            history=callbacks.curves,
            seconds=callbacks.seconds,
        )
        finished = None if best is None else best.result
        return FitState(self.seconds(), self.results.losses, finished, running).state_dict()

    def _stop_reason(
        self, restart: Restart, prepared: PreparedRestart, signal: str | None, steps: int
    ) -> StopReason | None:
        """Return how the restart ended, why it used no initial Normal, and the doubts of its importance weights."""
        if signal is not None:
            taken = restart.result.history.shape[1]
            words = f"was interrupted by {signal} after {taken:,} of {steps:,} steps"
            return StopReason(False, words, None, None, interrupted=signal)
        adaptive = prepared.problem.adaptive
        if adaptive is None:
            return None
        stop = adaptive.stop
        if prepared.plan is not None and prepared.plan.reason:
            stop = replace(stop, message=f"{stop.message}; it began where the guide does: {prepared.plan.reason}")
        if not stop.settled or stop.rhat is None:
            return stop

        def doubts() -> tuple[str, ...]:
            return restart.posterior(0.0).doubts(seed=self.options.seed)

        return replace(stop, doubts=doubts() if self.group is None else self.group.first(doubts))
