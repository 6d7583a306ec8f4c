"""What an engine is to do: which model and guide on which data, with how many particles and which optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.optim import Optimizer

from inference.annealing import Power
from inference.arguments import row_count
from inference.batch_stream import BatchStream
from inference.finding import Finding
from inference.fresh import Feed
from inference.isolation import RandomStream
from inference.minibatch import MiniBatch, RowScale
from inference.objective import Model, traces
from inference.optimizers import LearningRate
from inference.program import Program, name_of, set_training
from inference.sites import latent_values

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """A program with its data and the options of its optimisation; ``model`` and ``guide`` take mini-batches.

    ``anneal`` is β by step, the power that the target is raised to; a ``feed``
    draws the data of each step, ``batches`` are where they are read; ``landing`` finds step size and end from a start,
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
    batches: BatchStream | None = None
    landing: Finding | None = None
    sticking: bool = False
    theta: Tensor | None = None

    @property
    def begin(self) -> Tensor:
        """θ before the first step, (P,)."""
        own = self.theta if self.landing is None else self.landing.theta
        return self.program.params.flatten() if own is None else own.clone()

    @property
    def batch_inputs(self) -> dict[str, Tensor]:
        """The tensors that are others at each step, by the names of their inputs to a compiled one."""
        given = [] if self.batches is None else [value for value in self.args if isinstance(value, Tensor)]
        return {f"batch{i}": value for i, value in enumerate(given)}

    def args_at(self, step: int) -> tuple[Any, ...]:
        """The arguments of model and guide at a step, the batch that was read for it where there are batches."""
        return self.args if self.batches is None else self.batches.args(step)

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
        batches: BatchStream | None = options.get("batches")
        if batches is not None:
            scale = row_scale(program, args, batches.num_data)
            return cls(program, scale(program.model), scale(program.guide), args, **options)
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


def row_scale(program: Program, args: tuple[Any, ...], rows: int) -> RowScale:
    """What makes the batch ``args`` stand for all ``rows`` in model and guide.

    Raises
    ------
    ValueError
        If the model observes rows outside of a plate over them, or an autoguide
        would keep a distribution for each row of a batch.
    """
    batch = row_count(args) or 1
    scale = RowScale(rows / batch)
    longer = tuple(torch.cat([v, v[:1]]) if isinstance(v, Tensor) and v.dim() else v for v in args)
    automatic = isinstance(program.guide, AutoGuide)
    with program.running(program.params.flatten(), RandomStream.seeded(0)), torch.no_grad(), scale:
        for given in (longer, args):
            if not automatic:
                poutine.trace(program.guide).get_trace(*given)
            model_trace = poutine.trace(program.model).get_trace(*given)
    scale.require_use(model_trace, rows)
    own = [name for name in latent_values(model_trace) if scale.is_of_rows(model_trace.nodes[name])]
    if own and automatic:
        raise ValueError(
            f"{name_of(program.guide)} keeps a distribution for each row of {own}, and a fit by batches sees new rows "
            "at each step: use a guide that computes them from the row, such as amortized_encoder"
        )
    return scale
