"""The attempts of a fit: each from a start of its own, of which the best is kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.engine.batched.grouping import PreparedRestart, run_joined
from inference.engine.batched.runner import Lane
from inference.engine.compiled import CompiledEngine
from inference.engine.process_group import ProcessGroup
from inference.engine.selection import Engine, choose
from inference.engine.step_plan import StepPlan, automatic
from inference.engine.svi_problem import SVIProblem
from inference.model.bound_model import BoundModel
from inference.model.elbo import Model
from inference.optim.adaptive import AdaptiveOptimizer, StopReason
from inference.optim.initialization.pathfinder import InitialNormal, NoInitialNormal, start_again
from inference.optim.initialization.strategies import InitStrategy, initialize
from inference.posterior import Posterior
from inference.storage.atomic_files import ADVICE
from inference.storage.checkpoint import Checkpoint
from inference.storage.fit_fingerprint import Fingerprint
from inference.svi.attempt import Restart, RestartResults
from inference.svi.callbacks.base import Callback, CallbackRunner
from inference.svi.training_loop import CheckpointWriter, run_steps
from inference.utils.errors import NonFinite
from inference.utils.random_state import RandomStream

__all__ = ["Restarts"]

_ASIDE = 2**20  # the number of the random stream of steps that are no part of the record
_CALLER = 5  # frames up from a warning to the line that called fit


@dataclass
class Restarts:
    """What a fit is asked to do, its arguments checked.

    ``options`` are the task's, ``said`` what the record keeps of them; ``finds``
    says that steps are to be found, ``searches`` that a start is too, ``early``
    an end, and ``asked`` that the user said so; ``known`` that the same model, guide and
    data were checked before. Of the processes of a ``group``
    the first searches the start, and reads and writes the checkpoint.
    """

    model: Model
    guide: Model
    args: tuple[Any, ...]
    names: list[str]
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None
    options: dict[str, Any]
    steps: int
    seed: int
    engine: str
    init: InitStrategy
    finds: bool
    searches: bool
    asked: bool
    early: bool
    restarts: int
    callbacks: Sequence[Callback]
    progress: bool
    said: dict[str, Any]
    checkpoint: Checkpoint | None = None
    group: ProcessGroup | None = None
    known: bool = False
    _ended: RestartResults = field(default_factory=RestartResults)
    _running: dict[str, Any] | None = None
    _began: float = field(default_factory=time.perf_counter)

    def resume(self, stack: ExitStack, identity: Callable[[], Fingerprint], resume: bool) -> tuple[int, int] | None:
        """Look for a fit to go on with; the number of its start, from 1, and the step, where there is one.

        The checkpoint is held until the end of ``stack``.

        Raises
        ------
        ValueError
            If the checkpoint is not one of this fit, or nobody asked for it.
        """
        kept = self.checkpoint
        if kept is None:
            return None
        plain = not (self.finds or callable(self.options["lr"]) or self.options["anneal"]) and self.restarts == 1
        free = ("steps",) if plain else ()

        def found() -> dict[str, Any] | None:
            stack.enter_context(kept)
            return kept.begin(identity(), resume, free)

        saved = found() if self.group is None else self.group.first(found)
        if saved is None:
            return None
        with self._believing():
            self._began -= saved["seconds"]
            self._running, losses, best = saved["running"], list(saved["losses"]), saved["best"]
            self._ended = RestartResults(losses, None if best is None else self.again(best))
            step = int(self._running["engine"]["step"])
        if step > self.steps:
            raise ValueError(f"{kept.folder} has taken {step:,} steps: ask for as many, or for more")
        return len(losses) + 1, step

    @contextmanager
    def _believing(self) -> Iterator[None]:
        """Where a checkpoint is not of the form that it must have, one error that names it."""
        try:
            yield
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            folder = self.checkpoint.folder if self.checkpoint else None
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"the checkpoint in {folder} is damaged ({words}): {ADVICE}") from error

    @property
    def seconds(self) -> float:
        """Since the fit began, without the time in which nothing ran."""
        return time.perf_counter() - self._began

    @property
    def joins(self) -> bool:
        """Whether its starts may run together with others, in one program."""
        alone = self.callbacks or self.group is not None or self.options.get("batches") is not None
        return self.checkpoint is None and self.engine != "eager" and not alone

    def best(self, ready: Sequence[PreparedRestart | ValueError] = ()) -> tuple[Restart, tuple[float, ...]]:
        """The best of all attempts, and the loss of each, infinite where one failed.

        Starts that are ``ready``, and may have run, are gone on with.
        """
        if self.restarts > 1 and self.joins and not ready:
            ready = self.ready()
            run_joined(ready, self.engine, self.progress)
        for number in range(len(self._ended.losses), self.restarts):
            running, self._running = self._running, None
            try:
                fitted: Restart | None = self._attempt(
                    ready[number] if ready else self._started(number, running), running
                )
            except ValueError as error:
                if self.restarts == 1 or self._is_alone:
                    raise
                self._warn(f"start {number + 1} of {self.restarts} failed: {error}")
                fitted = None
            self._ended.add(fitted)
            if fitted is not None and fitted.stop is not None and fitted.stop.interrupted and not ready:
                break
        if self._ended.best is None:
            raise ValueError(f"all {self.restarts} starts failed; the warnings say at which step and site")
        stop = self._ended.best.stop
        if stop is not None and stop.interrupted:
            self._warn(f"the fit {stop.how}; this is the posterior so far")
        return self._ended.best, tuple(self._ended.losses)

    def _bound_model(self, number: int) -> tuple[BoundModel, RandomStream]:
        stream = RandomStream.seeded(self.seed, number)
        first = number == 0 and not self.known
        bound_model = BoundModel.start(
            self.model, self.guide, self.args, stream, self.device, self.dtype, first, self.batch_size
        )
        return bound_model, stream

    def again(self, saved: dict[str, Any]) -> Restart:
        """A start that had ended."""
        bound_model, stream = self._bound_model(saved["number"])
        fitted = Restart(
            *(saved["number"], bound_model, self.args, bound_model.params.flatten(), stream, self.names, self.seed, {}),
            batches=self.options.get("batches"),
        )
        fitted.restore(saved)
        return fitted

    def ready(self) -> list[PreparedRestart | ValueError]:
        """All starts, about to take their steps, or why one cannot."""
        found: list[PreparedRestart | ValueError] = []
        for number in range(self.restarts):
            try:
                found.append(self._started(number))
            except ValueError as error:
                if self.restarts == 1:
                    raise
                found.append(error)
        return found

    @property
    def kin(self) -> Hashable:
        """What fits share that may differ in their data, starts and random numbers alone."""
        return id(self.model), id(self.guide), self.batch_size, id(self.options.get("feed"))

    def _started(self, number: int, running: dict[str, Any] | None = None) -> PreparedRestart:
        """A start with its way found, or with that of the steps so far."""
        bound_model, stream = self._bound_model(number)
        plain = SVIProblem.of(bound_model, self.args, self.batch_size, self.group, **self.options)
        if running is not None:
            with self._believing():
                plain = replace(plain, theta=_like(running["theta"], plain.begin))
                plan = None if running["plan"] is None else StepPlan.restored(running["plan"], plain.begin)
                searched = int(running["searched"])
            return PreparedRestart(number, self.kin, plain, plan, stream, self.steps, searched)
        start = self._begun(bound_model, stream)
        plain = replace(plain, theta=plain.begin)
        if not self.finds:
            return PreparedRestart(number, self.kin, plain, None, stream, self.steps, start.evaluations)
        if not self.searches:
            start = NoInitialNormal("", start.evaluations)
        plan, searched = automatic(plain, start, self.steps, self.early, self._taken)
        if self.group is not None:
            plan = StepPlan.restored(self.group.first(plan.saved), plain.begin)
        return PreparedRestart(number, self.kin, plain, plan, stream, self.steps, searched)

    def _begun(self, bound_model: BoundModel, stream: RandomStream) -> InitialNormal | NoInitialNormal:
        """The guide put where it begins, and the start: what the first process finds, at all."""

        def found() -> InitialNormal | NoInitialNormal:
            with tqdm(
                desc="start", bar_format="{desc} {elapsed}", disable=not (self.searches and self.progress), leave=False
            ):
                return initialize(bound_model, self.args, stream, self.init, self.searches)

        def told() -> dict[str, Any]:
            return {"start": vars(found()), "theta": bound_model.params.flatten(), "stream": stream.saved()}

        if self.group is None:
            return found()
        there = self.group.first(told)
        bound_model.params.hold(there["theta"].to(bound_model.device))
        stream.state = RandomStream.restored(there["stream"]).state
        return start_again(there["start"], bound_model.device)

    def _attempt(self, ready: PreparedRestart | ValueError, running: dict[str, Any] | None = None) -> Restart:
        """By the plan, or where that fails and nobody asked for it by Adam."""
        if isinstance(ready, ValueError):
            raise ready
        try:
            return self._run(ready, running) if ready.lane is None else self._joined(ready, ready.lane)
        except ValueError as error:
            refused = running is not None and not isinstance(error, NonFinite)  # it could not go on at all
            if self.asked or ready.plan is None or refused or self._is_alone:
                raise
            self._warn(f"the steps that were found failed, so this is Adam: {error}")
            return self._run(replace(ready, plan=None, lane=None))

    def _fitted(
        self, ready: PreparedRestart, problem: SVIProblem, flat_params: Tensor, stream: RandomStream, used: str
    ) -> Restart:
        found = {"lr": "found", "optimizer": "auto"} if problem.adaptive else {}
        options = {**self.said, **found, "engine": used}
        return Restart(
            *(ready.number, problem.bound_model, self.args, flat_params, stream, self.names, self.seed, options),
            searched=ready.searched,
            batches=problem.batches,
        )

    def _joined(self, ready: PreparedRestart, lane: Lane) -> Restart:
        """What a start found that ran together with others."""
        fitted = self._fitted(ready, lane.problem, lane.flat_params, lane.stream, "compiled")
        fitted.curves = lane.curves
        if lane.error is not None:
            lane.error.posterior = self._so_far(fitted)
            raise lane.error
        why = ready.plan.why if ready.plan else ""
        fitted.stop = self._stop(fitted, lane.problem.adaptive, lane.interrupted, lane.steps, why)
        return fitted

    def _run(self, ready: PreparedRestart, running: dict[str, Any] | None = None) -> Restart:
        number, plain, plan, problem = ready.number, ready.plain, ready.plan, ready.problem
        bound_model, adaptive = problem.bound_model, problem.adaptive
        runner, state = choose(self._engine(running), problem, ready.stream, self.steps * self.restarts, self.progress)
        used = "compiled" if isinstance(runner, CompiledEngine) else "eager"
        fitted = self._fitted(ready, problem, state.flat_params, state.stream, used)
        most = adaptive.steps if adaptive else self.steps
        callback_runner = CallbackRunner(
            self.callbacks, most, bound_model.params, fitted.posterior, (number + 1, self.restarts)
        )
        if running is not None:
            self._restore(runner, state, callback_runner, running)
        kept = self.checkpoint if self.group is None or self.group.leads else None
        writer = CheckpointWriter(kept, partial(self._state, runner, state, callback_runner, plain, plan, fitted))
        label = f"fit {number + 1}/{self.restarts}" if self.restarts > 1 else "fit"
        try:
            signal = run_steps(runner, state, bound_model, callback_runner, label, self.progress, writer)
            writer.keep()
        except (NonFinite, OSError) as error:
            fitted.flat_params, fitted.curves = runner.result(state), callback_runner.curves
            error.posterior = self._so_far(fitted)  # type: ignore[union-attr]
            if isinstance(error, NonFinite):
                writer.keep(failed=True)
            raise
        fitted.flat_params, fitted.curves = runner.result(state), callback_runner.curves
        fitted.stop = self._stop(fitted, adaptive, signal, callback_runner.steps, plan.why if plan else "")
        return fitted

    def _engine(self, running: dict[str, Any] | None) -> str:
        """The engine to run on: that of the steps so far, where there are any."""
        if running is None:
            return self.engine
        used = str(running["used"])
        if self.engine not in ("auto", used):
            raise ValueError(f"the checkpoint is of the {used} engine, which draws other numbers: pass engine={used!r}")
        return used

    def _restore(self, runner: Engine, state: Any, callback_runner: CallbackRunner, running: dict[str, Any]) -> None:
        """Bring engine, rule of the steps and watch to where the fit stood."""
        adaptive = runner.problem.adaptive
        with self._believing():
            if adaptive is not None:
                adaptive.restore(running["finding"])
                callback_runner.steps = adaptive.steps
            _like(running["engine"]["flat"], state.flat_params)
            runner.restore(state, running["engine"])
            curves = _like(running["curves"], state.flat_params.new_empty(2, state.step))
            callback_runner.resume(curves, running["seconds"])

    def _state(
        self,
        runner: Engine,
        state: Any,
        callback_runner: CallbackRunner,
        plain: SVIProblem,
        plan: StepPlan | None,
        fitted: Restart,
    ) -> dict[str, Any]:
        """All that a fit needs to go on, as numbers and tensors."""
        adaptive = runner.problem.adaptive
        running = {
            "theta": plain.begin,
            "plan": None if plan is None else plan.saved(),
            "searched": fitted.searched,
            "used": fitted.options["engine"],
            "engine": runner.saved(state),
            "finding": None if adaptive is None else adaptive.saved(),
            "curves": callback_runner.curves,
            "seconds": callback_runner.seconds,
        }
        return {"seconds": self.seconds, "running": running, **self._ended.saved()}

    def _so_far(self, fitted: Restart) -> Posterior | None:
        """The posterior after the steps that there were, None where there were none."""
        return fitted.posterior(fitted.flat_params, fitted.curves, self.seconds) if fitted.curves.shape[1] else None

    def _stop(
        self, fitted: Restart, adaptive: AdaptiveOptimizer | None, signal: str | None, steps: int, why: str
    ) -> StopReason | None:
        """How the fit ended, why it began where the guide does, and what the guide's weights say of the place."""
        if signal is not None:
            taken = fitted.curves.shape[1]
            return StopReason(
                False, f"was interrupted by {signal} after {taken:,} of {steps:,} steps", None, None, interrupted=signal
            )
        if adaptive is None:
            return None
        stop = adaptive.stop
        if why:
            stop = replace(stop, how=f"{stop.how}; it began where the guide does: {why}")
        if not stop.settled or stop.rhat is None:
            return stop

        def doubts() -> tuple[str, ...]:
            return fitted.posterior(fitted.flat_params, fitted.curves, 0.0).doubts(seed=self.seed)

        return replace(stop, doubts=doubts() if self.group is None else self.group.first(doubts))

    @property
    def _is_alone(self) -> bool:
        """Whether an error is of this process and not of the others, which so do not begin again with it."""
        return self.group is not None and self.group.left

    def _taken(self, problem: SVIProblem, count: int) -> Tensor:
        """θ after ``count`` steps that nobody watches."""
        stream = RandomStream.seeded(self.seed, _ASIDE)
        runner, state = choose(self.engine, problem, stream, self.steps * self.restarts, self.progress)
        runner.advance(state, count)
        return runner.result(state).detach().clone()

    def _warn(self, words: str) -> None:
        warnings.warn(words, UserWarning, stacklevel=_CALLER)


def _like(saved: Tensor, here: Tensor) -> Tensor:
    """A saved tensor on the device that it is wanted on, if it is of the same shape and type."""
    if saved.shape != here.shape or saved.dtype != here.dtype:
        raise TypeError(f"{saved.dtype} {tuple(saved.shape)} for {here.dtype} {tuple(here.shape)}")
    return saved.to(here.device)
