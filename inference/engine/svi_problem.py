"""What an engine is to do: which model and guide on which data, with how many particles and which optimiser."""

from __future__ import annotations

from collections.abc import Callable
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
from inference.model.bound_model import BoundModel, set_training
from inference.model.elbo import Model, traces
from inference.model.row_scaling import row_scale
from inference.model.subsampling import Subsampling
from inference.optim.adaptive import AdaptiveOptimizer
from inference.optim.annealing import TemperingSchedule
from inference.optim.schedules import LearningRate
from inference.utils.random_state import RandomStream

__all__ = ["SVIProblem"]

_SHARED = ("a fit by several processes", "start one process alone")


@dataclass(frozen=True)
class SVIProblem:
    """A program with its data and the options of its optimisation; ``model`` and ``guide`` take mini-batches.

    ``anneal`` is β by step, the power that the target is raised to; a ``feed``
    draws the data of each step, ``batches`` are where they are read; ``adaptive`` finds step size and end from a start,
    and takes the place of the optimiser; ``sticking_the_landing`` is the kind of gradient;
    ``share`` is the part of the rows where several processes fit together. The
    optimiser begins at ``theta``, (P,), or where the program has its parameters.
    """

    bound_model: BoundModel
    model: Model
    guide: Model
    args: tuple[Any, ...]
    optimizer: str | Callable[..., Optimizer] = "adam"
    lr: LearningRate = 0.01
    particles: int = 1
    anneal: TemperingSchedule | None = None
    feed: GeneratedBatches | None = None
    batches: BatchLoader | None = None
    adaptive: AdaptiveOptimizer | None = None
    sticking_the_landing: bool = False
    theta: Tensor | None = None
    share: DataParallel | None = None

    @property
    def begin(self) -> Tensor:
        """θ before the first step, (P,)."""
        own = self.theta if self.adaptive is None else self.adaptive.theta
        return self.bound_model.params.flatten() if own is None else own.clone()

    def together(self) -> AbstractContextManager[None]:
        """Inside, losses and gradients are those of all processes."""
        return nullcontext() if self.share is None else self.share.group.reducing()

    @property
    def batch_inputs(self) -> dict[str, Tensor]:
        """The tensors that are others at each step, by the names of their inputs to a compiled one."""
        given = [] if self.batches is None else [value for value in self.args if isinstance(value, Tensor)]
        return {f"batch{i}": value for i, value in enumerate(given)}

    def args_at(self, step: int) -> tuple[Any, ...]:
        """The arguments of model and guide at a step, the batch that was read for it where there are batches."""
        return self.args if self.batches is None else self.batches.args(step)

    @classmethod
    def of(
        cls,
        bound_model: BoundModel,
        args: tuple[Any, ...],
        batch_size: int | None = None,
        group: ProcessGroup | None = None,
        **options: Any,
    ) -> SVIProblem:
        """The task of fitting ``bound_model``, with ``batch_size`` rows a step or fresh data where either is given.

        The processes of a ``group`` share the rows of each step.

        Raises
        ------
        ValueError
            If there are no rows to batch or share, or the model has no plate over them;
            if a target is to be annealed whose gradient needs the score function.
        """
        if options.get("anneal") is not None and bound_model.score_function_sites:
            raise ValueError(
                "anneal needs a guide whose draws are reparameterised, which its sites "
                f"{list(bound_model.score_function_sites)} are not"
            )
        set_training(bound_model.guide, True)
        feed: GeneratedBatches | None = options.get("feed")
        if feed is not None:
            if batch_size is not None:
                raise ValueError("batch_size is for data given as arrays: let the function draw fewer rows")
            problem = cls(bound_model, feed.model(bound_model.model), feed.guide(bound_model.guide), args, **options)
        elif options.get("batches") is not None:
            batch_size, scale = None, row_scale(bound_model, args, options["batches"].num_data)
            problem = cls(bound_model, scale(bound_model.model), scale(bound_model.guide), args, **options)
        else:
            problem = cls(bound_model, bound_model.model, bound_model.guide, args, **options)
        if batch_size is None and group is None:
            return problem
        rows = row_count(args)
        if rows is None:
            asks, advice = ("batch_size", "leave batch_size out") if group is None else _SHARED
            raise ValueError(f"{asks} needs data with rows, but no argument is an array: {advice}")
        size = rows if batch_size is None else min(batch_size, rows)
        share = None if group is None else DataParallel(group, size)
        with bound_model.running(bound_model.params.flatten(), RandomStream.seeded(0)):
            if share is None:
                batch = Subsampling(rows, size)
                traces(batch(problem.model), batch(problem.guide), args)
                batch.require_use()
            else:
                batch = Subsampling(rows, size, share.part, fixed_plates(bound_model.model, args))
                share = share.checked(batch, problem.model, problem.guide, args)
        return replace(problem, model=batch(problem.model), guide=batch(problem.guide), share=share)
