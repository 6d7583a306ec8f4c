"""One restart of a fit: chunks of steps, between which callbacks and checkpoints look, and why they ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from inference.engine.batched.grouping import PreparedRestart
from inference.engine.batched.runner import Lane
from inference.engine.engine import Engine, EngineState, IterateRecorder
from inference.engine.process_group import ProcessGroup
from inference.engine.selection import choose
from inference.engine.svi_problem import SVIProblem
from inference.model.bound_model import BoundModel, set_training
from inference.optim.adaptive import StopReason
from inference.storage.checkpoint import Checkpoint
from inference.svi.callbacks.base import CHUNK, CallbackRunner
from inference.svi.options import FitOptions, FitProblem
from inference.svi.state import FitState, Restart, RestartResult, RestartResults, RestartState, reading
from inference.utils.errors import NonFinite
from inference.utils.processes import StopSignal, interruptible
from inference.utils.random_state import RandomStream

__all__ = ["CheckpointWriter", "RestartRunner", "run_steps"]

_ASIDE = 2**20  # the number of the random stream of steps that are no part of the record
_CHUNK_SECONDS, _MOST_SECONDS = 0.05, 1.0


@dataclass
class RestartRunner:
    """Takes the steps of one restart at a time.

    ``results`` are those of the restarts before, which a checkpoint keeps too;
    ``began`` is when the fit began, on the clock of :func:`time.perf_counter`.
    """

    problem: FitProblem
    options: FitOptions
    group: ProcessGroup | None
    results: RestartResults
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the fit began, without the time in which nothing ran."""
        return time.perf_counter() - self.began

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
            error.posterior = restart.posterior_so_far(self.seconds)  # type: ignore[union-attr]
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
            lane.error.posterior = restart.posterior_so_far(self.seconds)
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
        return FitState(self.seconds, self.results.losses, finished, running).state_dict()

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


class CheckpointWriter:
    """What is kept of a fit on its way: ``state()`` in a checkpoint, where there is one."""

    def __init__(self, checkpoint: Checkpoint | None, state: Callable[[], dict[str, Any]]) -> None:
        self._checkpoint, self._state = checkpoint, state

    def until(self, step: int) -> int | None:
        """The next step to keep, where steps are counted."""
        return None if self._checkpoint is None else self._checkpoint.until(step)

    def look(self, step: int) -> None:
        """Keep what there is, if it is time."""
        if self._checkpoint is not None and self._checkpoint.due(step):
            self.keep()

    def keep(self, failed: bool = False) -> None:
        """Keep what there is, and whether its next step fails."""
        if self._checkpoint is not None:
            self._checkpoint.write({**self._state(), "failed": failed})


def run_steps(
    runner: Engine,
    state: EngineState,
    bound_model: BoundModel,
    callback_runner: CallbackRunner,
    label: str,
    progress: bool,
    writer: CheckpointWriter,
) -> str | None:
    """Take all steps in place, show a bar, call the callbacks; the name of the signal that ended them before, if any.

    Chunks grow until one takes a twentieth of a second, and shrink where one
    takes more than a second. They end where a callback is due, but for callbacks
    that only look while compiled steps run: those are told after the chunk what
    there was at their step.

    Raises
    ------
    NonFinite
        At a loss or gradient that is not finite, with the state, and what the
        callbacks were told, after the last good step.
    """
    size, adaptive = CHUNK, runner.problem.adaptive
    with (
        tqdm(total=callback_runner.steps, initial=state.step, unit="step", disable=not progress, desc=label) as bar,
        interruptible() as stop_signal,
    ):
        while (
            steps := _agreed(runner, min(size, _room(runner, state, callback_runner, writer)), stop_signal)
        ) and not stop_signal.signal:
            begun, iterates = (
                time.perf_counter(),
                IterateRecorder(partial(_until, callback_runner, adaptive.every if adaptive else None)),
            )
            failure = None
            try:
                chunk = runner.advance(state, steps, iterates)
            except NonFinite as error:
                failure = error
                if error.step == state.step:
                    raise
                iterates.kept.clear()
                chunk = runner.advance(state, error.step - state.step, iterates)
            size = _next_size(size, len(chunk), time.perf_counter() - begun)
            if progress:
                bar.set_postfix(elbo=f"{-chunk[:, 0].mean().item():.4g}", refresh=False)
            bar.update(len(chunk))
            _tell(runner, state, bound_model, callback_runner, chunk, iterates)
            bar.total = callback_runner.steps
            if failure is not None:
                raise failure
            writer.look(state.step)
    return stop_signal.signal


def _agreed(runner: Engine, steps: int, stop_signal: StopSignal) -> int:
    """How many steps come next: where processes share them as many as the first one says, and one's end is all's."""
    if runner.problem.share is None:
        return steps
    group, heard = runner.problem.share.group, signal.Signals[stop_signal.signal].value if stop_signal.signal else 0
    steps, heard = group.most(steps if group.leads else 0, heard)
    stop_signal.signal = signal.Signals(heard).name if heard else None
    return steps


def _room(runner: Engine, state: EngineState, callback_runner: CallbackRunner, writer: CheckpointWriter) -> int:
    """The steps until something is to be done in between."""
    late, adaptive, step = runner.keeps_iterates, runner.problem.adaptive, state.step
    stops = [callback_runner.steps if late and not callback_runner.may_change else callback_runner.until(step)]
    if adaptive is not None:
        look = adaptive.every if adaptive.every and not late else CHUNK
        stops.append(step + look - step % look)
    if runner.problem.loader is not None:
        stops.append(step + runner.problem.loader.most)
    kept = writer.until(step)
    return min(stops if kept is None else [*stops, kept]) - step


def _next_size(size: int, taken: int, seconds: float) -> int:
    if seconds < _CHUNK_SECONDS and taken == size:
        return 2 * size
    return max(1, size // 2) if seconds > _MOST_SECONDS else size


def _tell(
    runner: Engine,
    state: EngineState,
    bound_model: BoundModel,
    callback_runner: CallbackRunner,
    chunk: Tensor,
    iterates: IterateRecorder,
) -> None:
    """Tell callbacks and the rule of the steps what there is."""
    told, adaptive = callback_runner.tell(chunk, iterates), runner.problem.adaptive
    if adaptive is not None:
        every = adaptive.every
        points = [flat_params for at, _, flat_params in iterates.kept if every and at % every == 0]
        adaptive.look(state.step, points, callback_runner.curves[0])
        callback_runner.steps = adaptive.steps
    if told and state.step < callback_runner.steps:
        if not getattr(bound_model.guide, "training", True):  # it was asked
            set_training(bound_model.guide, True)
        if callback_runner.may_change:
            runner.refresh(state)


def _until(callback_runner: CallbackRunner, every: int | None, step: int) -> int:
    """The next step at which θ is wanted."""
    stop = callback_runner.until(step)
    return stop if every is None else min(stop, step + every - step % every)
