"""Stochastic variational inference: ``fit``."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import (
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
)
from torch import Tensor
from torch.optim import Optimizer

from inference.annealing import Power, as_power
from inference.arguments import (
    argument_names,
    as_dtype,
    as_tensors,
    positive_integer,
    positive_number,
    seed_number,
)
from inference.automatic import automatic
from inference.compiled import CompiledEngine
from inference.engines import choose
from inference.fitted import FitRecord
from inference.fresh import Feed, Fresh
from inference.isolation import RandomStream
from inference.landing import Stop
from inference.loop import run_steps
from inference.objective import Model
from inference.optimizers import LearningRate
from inference.posterior import Posterior
from inference.program import Program, device_for
from inference.task import Task
from inference.watch import Callback, Watch, opened, settled

__all__ = ["fit"]

USUAL_LR = 0.01
LONG = 1_000  # steps from which a fit is worth the search of its start


def fit(
    model: Model,
    guide: Model,
    *data: Any,
    steps: int = 10_000,
    lr: LearningRate | None = None,
    optimizer: str | Callable[..., Optimizer] | None = None,
    particles: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    engine: str = "auto",
    anneal: int | Power | None = None,
    restarts: int = 1,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
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
        Other objects are handed on unchanged. Or :func:`~inference.fresh`, with
        a function that draws them anew at each step.
    steps
        Optimiser steps.
    lr
        The step size: a number, or a function of the step (from 0) that returns
        one, such as :func:`cosine_decay`; 0.01 if left out.
    optimizer
        ``"adam"``, ``"adamw"``, ``"clippedadam"``, ``"sgd"``, or a callable that
        takes ``([θ], lr=lr)``; or ``"auto"``, which finds where to start (the
        mode), how to step (in coordinates in which the posterior is round) and
        when to stop (``steps`` is then the most), for guides of continuous
        latents on all rows. ``posterior.stop_reason`` says how it ended. If left
        out, a Normal guide goes that way where it can, unless ``steps`` are below
        1,000 or ``lr``, ``anneal`` or ``batch_size`` are given; other fits are Adam's.
    particles
        S, draws of z averaged in each step.
    batch_size
        B, rows a step; needs a model that writes ``pyro.plate("data", len(x))``
        and ``pyro.subsample``, which scale the density by N/B.
    seed
        The same seed, machine and engine give the same numbers. The process-wide
        random state and Pyro's parameter store are left as they are.
    device, dtype
        ``"auto"`` is where the networks of model and guide are, or else a CUDA
        GPU where there is one; None is torch's default float type.
    engine
        ``"compiled"`` records the model once and runs the steps as machine code;
        ``"eager"`` calls the model's Python at every step; ``"auto"`` compiles
        where that is expected to be sooner done (see :func:`~inference.engines.worth_compiling`).
        The two draw different random numbers for the same seed.
    anneal
        Flatten the target at first, so that a guide finds modes that lie apart: the
        gradient is that of −E_q [β log p(x, z) − log q(z)], where β rises from
        0.01 to 1 over this many steps, or is a function of the step. The losses
        are −ELBO all the same.
    restarts
        Fits from this many starts, with random numbers of their own, of which
        the one with the best ELBO is kept (the mean over the last tenth of its
        steps); ``posterior.record.starts`` has −ELBO of each. The first is what
        the same engine would make without restarts.
    progress
        Show a bar with the step, the ELBO and steps a second.
    callbacks
        Each is called with a :class:`~inference.watch.Progress` after every 100
        steps and at the end, or as :func:`every` says. A value that the model
        reads from outside may be changed there; the compiled engine notices
        and records the model again. Where every callback promises by an attribute
        ``only_looks = True`` to change nothing, it does not look, and calls them
        up to a tenth of a second late, with what was there at their step. One
        that is a context manager is entered before anything else is done, where
        it can still refuse, and left once when the fit has ended, with the
        exception if it failed.

    Raises
    ------
    ValueError
        If an argument, a column of the data, or a site is unfit; the message
        names it. Also if the loss stops being finite, with step and site; and
        under ``engine="compiled"`` if the model cannot be compiled, with the reason.

    References
    ----------
    Hoffman, Blei, Wang, Paisley (2013), Stochastic variational inference.
    Rezende, Mohamed (2015), Variational inference with normalizing flows (annealing).

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
    own = lr is not None or anneal is not None or batch_size is not None
    if own and optimizer == "auto":
        raise ValueError("optimizer='auto' finds its own steps, on all rows: leave lr, anneal and batch_size out")
    finds = optimizer == "auto" or (optimizer is None and not own and steps >= LONG)
    if lr is None:
        lr = USUAL_LR
    elif not callable(lr):
        lr = positive_number(lr, "lr")
    particles = positive_integer(particles, "particles")
    restarts = positive_integer(restarts, "restarts")
    power = as_power(anneal, steps)
    batch_size = None if batch_size is None else positive_integer(batch_size, "batch_size")
    if engine not in ("auto", "eager", "compiled"):
        raise ValueError(f"engine is {engine!r}: pass 'auto', 'eager' or 'compiled'")
    where, kind = device_for(device, model, guide), as_dtype(dtype)
    args, names, feed = _data(model, data, where, kind, seed_number(seed))
    options: dict[str, Any] = {
        "optimizer": optimizer or "adam",
        "lr": lr,
        "particles": particles,
        "anneal": power,
        "feed": feed,
    }
    said = {
        "steps": steps,
        "lr": f"{_name(lr)} from {lr(0):g}" if callable(lr) else lr,
        "optimizer": _name(optimizer or "adam"),
        "particles": particles,
        "batch_size": batch_size,
        "anneal": _name(anneal),
    }
    started = time.perf_counter()

    def taken(task: Task, count: int) -> Tensor:
        runner, state = choose(engine, task, RandomStream.seeded(seed_number(seed), 2**20), steps * restarts, progress)
        runner.advance(state, count)
        return runner.result(state).detach().clone()

    def start(number: int) -> _Attempt:
        stream = RandomStream.seeded(seed_number(seed), number)
        program = Program.start(model, guide, args, stream, where, kind, batch_size=batch_size)
        plain = Task.of(program, args, batch_size, **options)
        if not finds or feed is not None:
            return run(number, plain, stream)
        task, searched = automatic(plain, stream, steps, optimizer is not None, taken, progress)
        try:
            return run(number, task, stream, searched)
        except ValueError as error:
            if optimizer is not None or task.landing is None:
                raise
            warnings.warn(f"the steps that were found failed, so this is Adam: {error}", UserWarning, stacklevel=4)
            return run(number, plain, stream, searched)

    def run(number: int, task: Task, stream: RandomStream, searched: int = 0) -> _Attempt:
        program = task.program
        runner, state = choose(engine, task, stream, steps * restarts, progress)
        used = "compiled" if isinstance(runner, CompiledEngine) else "eager"
        found = {"lr": "found", "optimizer": "auto"} if task.landing else {}
        fitted = _Attempt(program, args, state.flat, stream, names, seed, {**said, **found, "engine": used})
        most = task.landing.steps if task.landing else steps
        watch = Watch(callbacks, most, program.params, fitted.posterior, (number + 1, restarts))
        label = f"fit {number + 1}/{restarts}" if restarts > 1 else "fit"
        fitted.curves = run_steps(runner, state, program, watch, label, progress)
        fitted.flat = runner.result(state)
        fitted.stop = task.landing.stop if task.landing else None
        fitted.searched = searched
        return fitted

    with opened(callbacks):
        best, starts = _best(start, restarts)
    return best.posterior(best.flat, best.curves, time.perf_counter() - started, starts)


def _data(
    model: Model, data: tuple[Any, ...], device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[tuple[Any, ...], list[str], Feed | None]:
    """The arguments of the model, what it calls them, and what draws them anew, if anything does."""
    if not any(isinstance(value, Fresh) for value in data):
        names = argument_names(model, len(data))
        return as_tensors(data, names, device, dtype), names, None
    if len(data) > 1:
        raise ValueError(f"fresh data stand alone, found {len(data)} arguments: let the function draw all of them")
    names = argument_names(model, 100)
    feed = Feed(data[0], names, device, dtype, seed)
    return feed.first, names[: len(feed.first)], feed


@dataclass
class _Attempt:
    """One start: where it is, and once it has ended its losses and KL, (2, steps)."""

    program: Program
    args: tuple[Any, ...]
    flat: Tensor
    stream: RandomStream
    names: list[str]
    seed: int
    options: dict[str, Any]
    curves: Tensor = field(default_factory=lambda: torch.empty(2, 0))
    stop: Stop | None = None
    searched: int = 0

    @property
    def loss(self) -> float:
        """−ELBO in nats, where the start ended."""
        return settled(self.curves[0])

    def posterior(self, flat: Tensor, curves: Tensor, seconds: float, starts: tuple[float, ...] = ()) -> Posterior:
        """The posterior at θ = ``flat``, after the steps with these losses and KL."""
        values, kl = curves.clone().cpu().numpy()
        evaluations = self.searched + len(values) * int(self.options["particles"])
        record = FitRecord(values, kl, seconds, self.seed, self.options, starts, evaluations, self.stop)
        program, finished = _finish(self.program, flat.detach(), self.args, self.stream)
        return Posterior(program, finished, self.args, self.names, record)


def _best(start: Callable[[int], _Attempt], restarts: int) -> tuple[_Attempt, tuple[float, ...]]:
    """The best of several starts, and the loss of each, infinite where one failed."""
    fits: list[_Attempt | None] = []
    for number in range(restarts):
        try:
            fits.append(start(number))
        except ValueError as error:
            if restarts == 1:
                raise
            warnings.warn(f"start {number + 1} of {restarts} failed: {error}", UserWarning, stacklevel=3)
            fits.append(None)
    whole = [fitted for fitted in fits if fitted is not None]
    if not whole:
        raise ValueError(f"all {restarts} starts failed; the warnings say at which step and site")
    return min(whole, key=lambda fitted: fitted.loss), tuple(f.loss if f is not None else math.inf for f in fits)


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
