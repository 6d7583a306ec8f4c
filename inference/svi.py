"""Stochastic variational inference: ``fit``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from inference.arguments import (
    argument_names,
    as_device,
    as_dtype,
    as_tensors,
    positive_integer,
    positive_number,
    seed_number,
)
from inference.compiled import CompiledEngine, NotCompilable, Untraceable
from inference.eager import EagerEngine
from inference.isolation import RandomStream
from inference.objective import Model
from inference.optimizers import LearningRate
from inference.posterior import FitRecord, Posterior
from inference.program import Program, name_of
from inference.task import Task

__all__ = ["Progress", "fit"]

CHUNK = 100
_CHUNK_SECONDS = 0.05
_ALWAYS_EAGER = 1_000  # a step count that cannot earn a compilation back, nor even the recording


class Engine(Protocol):
    """What ``fit`` asks of an engine, beside the state that it makes."""

    def advance(self, state: Any, steps: int) -> Tensor:
        """Take steps in place; their losses."""

    def refresh(self, state: Any) -> None:
        """Look again at what callbacks may have changed."""


@dataclass(frozen=True)
class Progress:
    """What a callback is told between chunks of steps."""

    step: int
    steps: int
    losses: Tensor
    seconds: float


def fit(
    model: Model,
    guide: Model,
    *data: Any,
    steps: int = 10_000,
    lr: LearningRate = 0.01,
    optimizer: str | Callable[..., Optimizer] = "adam",
    particles: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    engine: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callable[[Progress], None]] = (),
) -> Posterior:
    """Fit ``guide`` to the posterior of ``model`` given ``data``, by maximising the ELBO.

    ELBO(θ) = E_q [log p(x, z) − log q_θ(z)], in nats; ``posterior.losses`` holds
    −ELBO, one estimate a step.

    Parameters
    ----------
    model
        A Pyro model function or PyroModule, called as ``model(*data)``. For
        prediction it must run without its last argument, ``model(x, y=None)``.
    guide
        Anything Pyro takes as a guide, called as ``guide(*data)``. It is copied:
        the object itself stays as it was.
    data
        Arrays, tensors or frames with one row an observation, usually ``x, y``.
        Other objects are handed on unchanged.
    steps
        Optimiser steps.
    lr
        The step size: a number, or a function of the step (from 0) that returns
        one, such as :func:`cosine_decay`.
    optimizer
        ``"adam"``, ``"adamw"``, ``"sgd"``, or a callable that takes ``([θ], lr=lr)``.
    particles
        S, draws of z averaged in each step.
    batch_size
        B, rows a step; needs a model that writes ``pyro.plate("data", len(x))``
        and ``pyro.subsample``, which scale the density by N/B.
    seed
        The same seed, machine and engine give the same numbers. The process-wide
        random state and Pyro's parameter store are left as they are.
    device, dtype
        ``"auto"`` is a CUDA GPU where there is one; None is torch's default float type.
    engine
        ``"compiled"`` records the model once and runs the steps as machine code;
        ``"eager"`` calls the model's Python at every step; ``"auto"`` compiles
        where that is expected to be sooner done (see :func:`worth_compiling`).
        The two draw different random numbers for the same seed.
    progress
        Show a bar with the step, the ELBO and steps a second.
    callbacks
        Each is called with a :class:`Progress` after every 100 steps. A value
        that the model reads from outside may be changed there; the compiled
        engine notices and records the model again.

    Raises
    ------
    ValueError
        If an argument, a column of the data, or a site is unfit; the message
        names it. Also if the loss stops being finite, with step and site; and
        under ``engine="compiled"`` if the model cannot be compiled, with the reason.

    References
    ----------
    Hoffman, Blei, Wang, Paisley (2013), Stochastic variational inference.

    Examples
    --------
    >>> import torch
    >>> from guides import mean_field_normal
    >>> from ppl_models import linear_regression
    >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
    >>> y = 2.0 * x[:, 0] + 1.0
    >>> posterior = fit(linear_regression, mean_field_normal(linear_regression), x, y, steps=500, progress=False)
    >>> posterior.losses.shape
    (500,)
    >>> sorted(posterior.sample(10))
    ['bias', 'noise', 'weights']
    """
    steps = positive_integer(steps, "steps")
    if not callable(lr):
        lr = positive_number(lr, "lr")
    particles = positive_integer(particles, "particles")
    batch_size = None if batch_size is None else positive_integer(batch_size, "batch_size")
    if engine not in ("auto", "eager", "compiled"):
        raise ValueError(f"engine is {engine!r}: pass 'auto', 'eager' or 'compiled'")
    where, kind = as_device(device), as_dtype(dtype)
    names = argument_names(model, len(data))
    args = as_tensors(data, names, where, kind)
    stream = RandomStream.seeded(seed_number(seed))
    program = Program.start(model, guide, args, stream, where, kind)
    task = Task.of(program, args, batch_size, optimizer=optimizer, lr=lr, particles=particles)
    started = time.perf_counter()
    runner, state = _choose(engine, task, stream, steps, progress)
    losses = _run(runner, state, steps, progress, callbacks)
    record = FitRecord(
        losses=losses.cpu().numpy(),
        seconds=time.perf_counter() - started,
        seed=seed,
        options={
            "steps": steps,
            "lr": f"{_name(lr)} from {lr(0):g}" if callable(lr) else lr,
            "optimizer": _name(optimizer),
            "particles": particles,
            "batch_size": batch_size,
            "engine": "compiled" if isinstance(runner, CompiledEngine) else "eager",
        },
    )
    program, flat = _finish(program, state.flat.detach(), args, stream)
    return Posterior(program, flat, args, names, record)


def worth_compiling(operators: int, steps: int) -> bool:
    """Whether compiled steps make up for the time that compiling takes.

    An eager step costs at least 5.5 µs of Python for each of its ``operators``;
    compiling takes at most 5 s and 7 ms an operator. Both were measured on the
    machine of benchmarks/README.md. Nothing is timed here, nor looked up among
    the programs compiled before, so that the same call takes the same way every
    time.

    >>> worth_compiling(operators=450, steps=2_000), worth_compiling(operators=450, steps=10_000)
    (False, True)
    """
    return steps * operators * 5.5e-6 > 5 + operators * 7e-3


def _choose(engine: str, task: Task, stream: RandomStream, steps: int, progress: bool) -> tuple[Engine, Any]:
    """The engine to run, and its first state."""
    if engine == "eager" or (engine == "auto" and steps < _ALWAYS_EAGER):
        eager = EagerEngine(task)
        return eager, eager.init(stream)
    try:
        compiled = CompiledEngine(task, stream)
        if engine == "compiled" or worth_compiling(compiled.operators, steps):
            with tqdm(desc="compile", bar_format="{desc} {elapsed}", disable=not progress, leave=False):
                return compiled, compiled.init(stream)
    except (Untraceable, NotCompilable) as error:
        reason = f"the model {name_of(task.program.model)!r} cannot be compiled: {error}"
        if engine == "compiled":
            raise ValueError(f"{reason}; engine='eager' runs it as it is") from error
        warnings.warn(f"{reason}; it runs eagerly, pass engine='eager' to say so", UserWarning, stacklevel=3)
    eager = EagerEngine(task)
    return eager, eager.init(stream)


def _run(
    runner: Engine, state: Any, steps: int, progress: bool, callbacks: Sequence[Callable[[Progress], None]]
) -> Tensor:
    started = time.perf_counter()
    chunks = []
    with tqdm(total=steps, unit="step", disable=not progress, desc="fit") as bar:
        size = CHUNK
        while state.step < steps:
            begun = time.perf_counter()
            chunk = runner.advance(state, min(size, steps - state.step))
            chunks.append(chunk)
            if not callbacks and time.perf_counter() - begun < _CHUNK_SECONDS:
                size *= 2
            bar.set_postfix(elbo=f"{-chunk.mean().item():.4g}", refresh=False)
            bar.update(len(chunk))
            for callback in callbacks:
                callback(Progress(state.step, steps, chunk, time.perf_counter() - started))
            if callbacks and state.step < steps:
                runner.refresh(state)
    return torch.cat(chunks)


def _finish(program: Program, flat: Tensor, args: tuple[Any, ...], stream: RandomStream) -> tuple[Program, Tensor]:
    """Turn the mode that AutoLaplaceApproximation found into its Normal; other guides stay as they are."""
    if not isinstance(program.guide, AutoLaplaceApproximation):
        return program, flat
    with program.running(flat, stream):
        normal = program.guide.laplace_approximation(*args)
        values = {f"AutoMultivariateNormal.{k}": getattr(normal, k) for k in ("loc", "scale", "scale_tril")}
    guide = AutoMultivariateNormal(program.guide.model)
    finished = Program.start(program.model, guide, args, stream, program.device, program.dtype)
    kept = program.params.constrained(flat)
    return finished, finished.params.unconstrained({**kept, **values})


def _name(option: Any) -> Any:
    return getattr(option, "__name__", type(option).__name__) if callable(option) else option
