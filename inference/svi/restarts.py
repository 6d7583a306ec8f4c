"""Restarts of a fit: each is planned and run, or resumed, and the best is kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from inference.data.batch_loader import BatchLoader
from inference.data.generated_dataset import GeneratedBatches
from inference.engine.batched.grouping import PreparedRestart, run_joined
from inference.engine.process_group import ProcessGroup
from inference.engine.svi_problem import InMemory, StepPlan, SVIProblem, automatic
from inference.model.bound_model import BoundModel
from inference.optim.initialization.initial_normal import InitialNormal, NoInitialNormal
from inference.optim.initialization.strategies import initialize
from inference.svi.options import FitOptions, FitProblem, StepRule, fingerprint_of_fit
from inference.svi.restart_runner import RestartRunner
from inference.svi.state import FitState, Restart, RestartResult, RestartResults, RestartState
from inference.utils.errors import NonFinite
from inference.utils.random_state import RandomStream
from inference.utils.warnings import warn

__all__ = ["Restarts"]


class Restarts:
    """The restarts of one fit.

    ``skip_validation`` says that the same model, guide and data were checked before.
    Of the processes of a ``group`` the first searches the initial values, and reads and writes the checkpoint.
    """

    def __init__(self, problem: FitProblem, options: FitOptions, group: ProcessGroup | None = None) -> None:
        self.problem, self.options, self.group = problem, options, group
        self.skip_validation = False
        self._is_fixed = options.step_rule is StepRule.FIXED
        self._searches_start = problem.is_in_memory and not self._is_fixed
        self._results = RestartResults()
        self._resumed: tuple[PreparedRestart, RestartState] | None = None
        self._runner = RestartRunner(problem, options, group, self._results)

    @property
    def seconds(self) -> float:
        """Since the fit began, without the time in which nothing ran."""
        return self._runner.seconds

    @property
    def can_join(self) -> bool:
        """Whether the restarts may run together with others, in one program."""
        alone = self.options.callbacks or self.group is not None or isinstance(self.problem.data, BatchLoader)
        return self.options.checkpoint is None and self.options.engine != "eager" and not alone

    @property
    def trace_key(self) -> Hashable:
        """Key that fits share which differ in their data, initial values and random numbers alone."""
        generated = id(self.problem.data) if isinstance(self.problem.data, GeneratedBatches) else None
        return id(self.problem.model), id(self.problem.guide), self._batch_size, generated

    def resume(self, stack: ExitStack) -> tuple[int, int] | None:
        """Look for a fit to resume; return the number of its restart, from 1, and the step, if there is one.

        The checkpoint is held until the end of ``stack``.

        Raises
        ------
        ValueError
            If the checkpoint is not one of this fit, is damaged, or nobody asked to resume it.
        """
        options, kept = self.options, self.options.checkpoint_folder
        if kept is None:
            return None
        is_constant = self._is_fixed and not (callable(options.lr) or options.anneal) and options.restarts == 1

        def found() -> dict[str, Any] | None:
            stack.enter_context(kept)
            return kept.begin(
                fingerprint_of_fit(self.problem, options), options.resume, ("steps",) if is_constant else ()
            )

        saved = found() if self.group is None else self.group.first(found)
        if saved is None:
            return None
        bound_model, stream = self._bound_model(0)
        state = FitState.from_state_dict(saved, bound_model.params.flatten(), kept.folder)
        number, running = len(state.losses), state.running
        if running.step > options.steps:
            raise ValueError(f"{kept.folder} has taken {running.step:,} steps: ask for as many, or for more")
        self._runner.began -= state.seconds
        self._results.losses = state.losses
        self._results.best = None if state.best is None else self.restored(state.best)
        if number:
            bound_model, stream = self._bound_model(number)
        plain = replace(self._svi_problem(bound_model), theta=running.initial_params)
        self._resumed = self._prepared(number, plain, running.plan, stream, running.num_evaluations), running
        return number + 1, running.step

    def best(self, prepared: Sequence[PreparedRestart | ValueError] = ()) -> tuple[Restart, tuple[float, ...]]:
        """Return the best of all restarts, and the loss of each, infinite where one failed.

        Restarts that are ``prepared``, and may have run, are continued.
        """
        count = self.options.restarts
        if count > 1 and self.can_join and not prepared:
            prepared = self.prepare()
            run_joined(prepared, self.options.engine, self.options.progress)
        for number in range(len(self._results.losses), count):
            (resumed, running), self._resumed = self._resumed or (None, None), None
            try:
                ready = resumed or (prepared[number] if prepared else self._prepare(number))
                restart: Restart | None = self._run(ready, running)
            except ValueError as error:
                if count == 1 or self._has_left:
                    raise
                warn(f"start {number + 1} of {count} failed: {error}")
                restart = None
            self._results.add(restart)
            stop = restart.result.stop if restart else None
            if stop is not None and stop.interrupted and not prepared:
                break
        best = self._results.best
        if best is None:
            raise ValueError(f"all {count} starts failed; the warnings say at which step and site")
        if best.result.stop is not None and best.result.stop.interrupted:
            warn(f"the fit {best.result.stop.message}; this is the posterior so far")
        return best, tuple(self._results.losses)

    def prepare(self) -> list[PreparedRestart | ValueError]:
        """Return all restarts, ready to take their steps, or why one is not."""
        found: list[PreparedRestart | ValueError] = []
        for number in range(self.options.restarts):
            try:
                found.append(self._prepare(number))
            except ValueError as error:
                if self.options.restarts == 1:
                    raise
                found.append(error)
        return found

    def restored(self, result: RestartResult) -> Restart:
        """Return the restart that has found ``result``, perhaps in another process."""
        bound_model, _ = self._bound_model(result.number)
        return Restart(self.problem, self.options.seed, self.options.particles, bound_model, result)

    @property
    def _batch_size(self) -> int | None:
        return self.problem.data.batch_size if isinstance(self.problem.data, InMemory) else None

    @property
    def _has_left(self) -> bool:
        """Whether an error is of this process and not of the others, which so do not begin again with it."""
        return self.group is not None and self.group.left

    def _bound_model(self, number: int) -> tuple[BoundModel, RandomStream]:
        problem, stream = self.problem, RandomStream.seeded(self.options.seed, number)
        checks = number == 0 and not self.skip_validation
        bound_model = BoundModel.start(
            *(problem.model, problem.guide, problem.args, stream, problem.device, problem.dtype),
            checks,
            self._batch_size,
        )
        return bound_model, stream

    def _svi_problem(self, bound_model: BoundModel) -> SVIProblem:
        options = self.options
        problem = SVIProblem.on(
            bound_model,
            self.problem.data,
            optimizer=options.base_optimizer,
            lr=options.step_size,
            particles=options.particles,
            anneal=options.tempering,
        )
        return problem if self.group is None else problem.sharded(self.group)

    def _prepared(
        self, number: int, plain: SVIProblem, plan: StepPlan | None, stream: RandomStream, num_evaluations: int
    ) -> PreparedRestart:
        return PreparedRestart(number, self.trace_key, plain, plan, stream, self.options.steps, num_evaluations)

    def _prepare(self, number: int) -> PreparedRestart:
        """Return a restart with its initial values and its plan."""
        bound_model, stream = self._bound_model(number)
        plain = self._svi_problem(bound_model)
        initial = self._initialize(bound_model, stream)
        plain = replace(plain, theta=plain.begin)
        if self._is_fixed:
            return self._prepared(number, plain, None, stream, initial.evaluations)
        if not self._searches_start:
            initial = NoInitialNormal("", initial.evaluations)
        options = self.options
        plan, evaluations = automatic(plain, initial, options.steps, options.stop_early, self._runner.iterate_after)
        if self.group is not None:
            plan = StepPlan.from_state_dict(self.group.first(plan.state_dict), plain.begin)
        return self._prepared(number, plain, plan, stream, evaluations)

    def _initialize(self, bound_model: BoundModel, stream: RandomStream) -> InitialNormal | NoInitialNormal:
        """Put the guide at its initial values; of several processes the first one finds them."""

        def found() -> InitialNormal | NoInitialNormal:
            hidden = not (self._searches_start and self.options.progress)
            with tqdm(desc="start", bar_format="{desc} {elapsed}", disable=hidden, leave=False):
                return initialize(bound_model, self.problem.args, stream, self.options.init, self._searches_start)

        def sent() -> tuple[Any, ...]:
            initial = found()
            is_normal = isinstance(initial, InitialNormal)
            return is_normal, dict(vars(initial)), bound_model.params.flatten(), stream.saved()

        if self.group is None:
            return found()
        is_normal, saved, theta, random_state = self.group.first(sent)
        bound_model.params.hold(theta.to(bound_model.device))
        stream.state = RandomStream.restored(random_state).state
        return InitialNormal.from_state_dict(saved, bound_model.device) if is_normal else NoInitialNormal(**saved)

    def _run(self, prepared: PreparedRestart | ValueError, resumed: RestartState | None) -> Restart:
        """Take the steps of the plan; if they fail, and the user did not ask for a plan, take those of Adam."""
        if isinstance(prepared, ValueError):
            raise prepared
        try:
            if prepared.lane is not None:
                return self._runner.from_lane(prepared, prepared.lane)
            return self._runner.run(prepared, resumed)
        except ValueError as error:
            refused = resumed is not None and not isinstance(error, NonFinite)  # it could not be resumed at all
            requested = self.options.step_rule is StepRule.SEARCHED_ON_REQUEST
            if requested or prepared.plan is None or refused or self._has_left:
                raise
            warn(f"the steps that were found failed, so this is Adam: {error}")
            return self._runner.run(replace(prepared, plan=None, lane=None))
