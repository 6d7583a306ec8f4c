"""The problem that an engine solves: model and guide on data, with an optimiser or a plan by which to find its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from inference.data.arguments import row_count
from inference.data.batch_loader import BatchLoader
from inference.data.generated_dataset import GeneratedBatches
from inference.engine.data_parallel import DataParallel, fixed_plates
from inference.engine.process_group import ProcessGroup
from inference.model.bound_model import BoundModel, row_scale, set_training
from inference.model.elbo import Model, traces
from inference.model.protocols import HasScaleTril, supports
from inference.model.subsampling import Subsampling
from inference.optim.adaptive import AdaptiveOptimizer
from inference.optim.averaged_adam import AveragedAdam
from inference.optim.initialization.initial_normal import InitialNormal, NoInitialNormal, place_guide, start_at
from inference.optim.prodigy import Prodigy
from inference.optim.schedules import LearningRate, TemperingSchedule
from inference.optim.whitening import PathMoments, whitening
from inference.utils.random_state import RandomStream

__all__ = ["DataSource", "InMemory", "SVIProblem", "StepPlan", "automatic"]

_MENDING = 2_000  # steps that mend the coordinates of a start that is no mode


@dataclass(frozen=True)
class InMemory:
    """Arguments of the model that lie in memory, of which a step uses ``batch_size`` rows, or all of them."""

    first: tuple[Any, ...]
    batch_size: int | None = None


DataSource = InMemory | GeneratedBatches | BatchLoader  # ``first`` of each are the arguments of the first step


@dataclass(frozen=True)
class SVIProblem:
    """A bound model with its data and the options of its optimisation; made by :meth:`on`.

    ``model`` and ``guide`` are those of ``bound_model``, made to run on the rows of one
    step. ``anneal`` is β by step, the power that the target is raised to. ``adaptive``
    takes the place of ``optimizer`` and ``lr``. ``share`` is the part of the rows that
    this process has where several fit together. The optimiser starts from ``theta``, (P,),
    or from the parameters of ``bound_model``.
    """

    bound_model: BoundModel
    model: Model
    guide: Model
    data: DataSource
    optimizer: str | Callable[..., Optimizer] = "adam"
    lr: LearningRate = 0.01
    particles: int = 1
    anneal: TemperingSchedule | None = None
    adaptive: AdaptiveOptimizer | None = None
    sticking_the_landing: bool = False
    theta: Tensor | None = None
    share: DataParallel | None = None

    @classmethod
    def on(
        cls,
        bound_model: BoundModel,
        data: DataSource,
        *,
        optimizer: str | Callable[..., Optimizer] = "adam",
        lr: LearningRate = 0.01,
        particles: int = 1,
        anneal: TemperingSchedule | None = None,
    ) -> SVIProblem:
        """Return the problem of fitting ``bound_model`` to ``data`` in one process.

        Raises
        ------
        ValueError
            If there are no rows to take mini-batches of, or the model has no plate over them;
            if a target is to be annealed whose gradient needs the score function.
        """
        if anneal is not None and bound_model.score_function_sites:
            raise ValueError(
                "anneal needs a guide whose draws are reparameterised, which its sites "
                f"{list(bound_model.score_function_sites)} are not"
            )
        set_training(bound_model.guide, True)
        model, guide = _on_source(bound_model, data)
        problem = cls(bound_model, model, guide, data, optimizer, lr, particles, anneal)
        if not isinstance(data, InMemory) or data.batch_size is None:
            return problem
        rows = _rows(data, "batch_size", "leave batch_size out")
        batch = Subsampling(rows, min(data.batch_size, rows))
        with problem.at_start():
            traces(batch(model), batch(guide), data.first)
            batch.require_use()
        return replace(problem, model=batch(model), guide=batch(guide))

    def sharded(self, group: ProcessGroup) -> SVIProblem:
        """Return the problem in which the processes of ``group`` share the rows of each step.

        Raises
        ------
        ValueError
            If there are no rows to share, or the model has no plate over them.
        """
        args, rows = self.args, _rows(self.data, "a fit by several processes", "start one process alone")
        batch_size = self.data.batch_size if isinstance(self.data, InMemory) else None
        share = DataParallel(group, rows if batch_size is None else min(batch_size, rows))
        model, guide = _on_source(self.bound_model, self.data)
        with self.at_start():
            batch = Subsampling(rows, share.rows, share.part, fixed_plates(self.bound_model.model, args))
            share = share.checked(batch, model, guide, args)
        return replace(self, model=batch(model), guide=batch(guide), share=share)

    @property
    def args(self) -> tuple[Any, ...]:
        """Arguments of model and guide: all of the data, or those of the first step."""
        return self.data.first

    @property
    def loader(self) -> BatchLoader | None:
        """The reader of each step's rows, if they do not lie in memory."""
        return self.data if isinstance(self.data, BatchLoader) else None

    @property
    def begin(self) -> Tensor:
        """θ before the first step, (P,)."""
        own = self.theta if self.adaptive is None else self.adaptive.theta
        return self.bound_model.params.flatten() if own is None else own.clone()

    def at_start(self) -> AbstractContextManager[None]:
        """Run model and guide inside at the bound parameters, with random numbers of their own."""
        return self.bound_model.running(self.bound_model.params.flatten(), RandomStream.seeded(0))

    def together(self) -> AbstractContextManager[None]:
        """Inside, losses and gradients are those of all processes."""
        return nullcontext() if self.share is None else self.share.group.reducing()

    @property
    def batch_tensors(self) -> list[Tensor]:
        """The arguments that differ at each step, as inputs to a compiled step."""
        return [] if self.loader is None else [value for value in self.args if isinstance(value, Tensor)]

    def args_at(self, step: int) -> tuple[Any, ...]:
        """The arguments of model and guide at a step."""
        return self.args if self.loader is None else self.loader.args(step)


def _on_source(bound_model: BoundModel, data: DataSource) -> tuple[Model, Model]:
    """Return model and guide as they run on all rows of one step of ``data``."""
    if isinstance(data, GeneratedBatches):
        return data.model(bound_model.model), data.guide(bound_model.guide)
    if isinstance(data, BatchLoader):
        scale = row_scale(bound_model, data.first, data.num_data)
        return scale(bound_model.model), scale(bound_model.guide)
    return bound_model.model, bound_model.guide


def _rows(data: DataSource, what: str, advice: str) -> int:
    rows = row_count(data.first)
    if rows is None:
        raise ValueError(f"{what} needs data with rows, but no argument is an array: {advice}")
    return rows


@dataclass(frozen=True)
class StepPlan:
    """How a fit is to find its way: from θ = ``theta``, (P,), in at most ``steps``.

    In the coordinates of ``start``, or by steps that need none, for the given ``reason``;
    without ``stop_early`` all steps are taken.
    """

    theta: Tensor
    steps: int
    stop_early: bool
    start: InitialNormal | None = None
    reason: str = ""

    def problem(self, problem: SVIProblem) -> SVIProblem:
        """The task with these steps in the place of an optimiser."""
        problem = replace(problem, optimizer="adam")
        if self.start is None:
            return replace(problem, adaptive=Prodigy(self.theta, self.steps, self.stop_early))
        bound_model, correlated = problem.bound_model, _has_triangle(problem)
        judged = PathMoments(bound_model, self.start) if correlated else None
        white = whitening(bound_model, self.start, self.theta)
        adaptive = AveragedAdam(white, self.theta, self.steps, self.stop_early, judged)
        return replace(problem, adaptive=adaptive, sticking_the_landing=correlated)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan as numbers and tensors, by the names that checkpoints hold."""
        return {
            "theta": self.theta,
            "steps": self.steps,
            "early": self.stop_early,
            "start": None if self.start is None else dict(vars(self.start)),
            "why": self.reason,
        }

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], like: Tensor) -> StepPlan:
        """Return the plan that was saved, its tensors on the device of ``like``."""
        start = None if saved["start"] is None else InitialNormal.from_state_dict(saved["start"], like.device)
        return cls(saved["theta"].to(like), saved["steps"], saved["early"], start, saved["why"])


def automatic(
    problem: SVIProblem,
    start: InitialNormal | NoInitialNormal,
    steps: int,
    stop_early: bool,
    taken: Callable[[SVIProblem, int], Tensor],
) -> tuple[StepPlan, int]:
    """How to find a step size and an end from ``start``, and what that and the start cost in gradients.

    Without a start the guide goes from where it is, by steps of its own; also
    where the search ended at no mode, as it does for the weights of a network,
    but for guides with a triangle, whose many numbers need coordinates. Those are
    then moved for 2,000 of the ``steps``, by ``taken``, and the coordinates made
    anew after it.
    """
    bound_model, reason = problem.bound_model, ""
    if isinstance(start, NoInitialNormal):
        reason = start.reason
    elif not (start.is_mode or _has_triangle(problem)):
        reason = "the search of the mode ended at none"
    if isinstance(start, NoInitialNormal) or reason:
        return StepPlan(bound_model.params.flatten(), steps, stop_early, reason=reason), start.evaluations
    theta = place_guide(bound_model, start)
    if start.is_mode or steps < 3 * _MENDING:
        return StepPlan(theta, steps, stop_early, start), start.evaluations
    theta = taken(StepPlan(theta, _MENDING, stop_early, start).problem(problem), _MENDING)
    mended = StepPlan(theta, steps - _MENDING, stop_early, start_at(bound_model, start, theta))
    return mended, start.evaluations + _MENDING * problem.particles


def _has_triangle(problem: SVIProblem) -> bool:
    return supports(problem.bound_model.guide, HasScaleTril)
