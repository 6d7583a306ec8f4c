"""What an engine is to do: which model and guide on which data, with how many particles and which optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from inference.annealing import Power
from inference.arguments import row_count
from inference.finding import Finding
from inference.fresh import Feed
from inference.isolation import RandomStream
from inference.minibatch import MiniBatch
from inference.objective import Model, traces
from inference.optimizers import LearningRate
from inference.program import Program, set_training

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """A program with its data and the options of its optimisation; ``model`` and ``guide`` take mini-batches.

    ``anneal`` is β by step, the power that the target is raised to; a ``feed``
    draws the data of each step; ``landing`` finds step size and end from a start,
    and takes the place of the optimiser; ``sticking`` is the kind of gradient. The
    optimiser begins at ``theta``, (P,), or where the program has its parameters.
    """

    program: Program
    model: Model
    guide: Model
    args: tuple[Any, ...]
    optimizer: str | Callable[..., Optimizer] = "adam"
    lr: LearningRate = 0.01
    particles: int = 1
    anneal: Power | None = None
    feed: Feed | None = None
    landing: Finding | None = None
    sticking: bool = False
    theta: Tensor | None = None

    @property
    def begin(self) -> Tensor:
        """θ before the first step, (P,)."""
        own = self.theta if self.landing is None else self.landing.theta
        return self.program.params.flatten() if own is None else own.clone()

    @classmethod
    def of(cls, program: Program, args: tuple[Any, ...], batch_size: int | None = None, **options: Any) -> Task:
        """The task of fitting ``program``, with ``batch_size`` rows a step or fresh data where either is given.

        Raises
        ------
        ValueError
            If there are no rows to batch, or the model has no plate over them;
            if a target is to be annealed whose gradient needs the score function.
        """
        if options.get("anneal") is not None and program.scored:
            raise ValueError(
                f"anneal needs a guide whose draws are reparameterised, which its sites {list(program.scored)} are not"
            )
        set_training(program.guide, True)
        feed: Feed | None = options.get("feed")
        if feed is not None:
            if batch_size is not None:
                raise ValueError("batch_size is for data given as arrays: let the function draw fewer rows")
            return cls(program, feed.model(program.model), feed.guide(program.guide), args, **options)
        if batch_size is None:
            return cls(program, program.model, program.guide, args, **options)
        rows = row_count(args)
        if rows is None:
            raise ValueError("batch_size needs data with rows, but no argument is an array: leave batch_size out")
        batch = MiniBatch(rows, batch_size)
        task = cls(program, batch(program.model), batch(program.guide), args, **options)
        with program.running(program.params.flatten(), RandomStream.seeded(0)):
            traces(task.model, task.guide, args)
        batch.require_use()
        return task
