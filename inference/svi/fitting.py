"""Stochastic variational inference: ``fit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from inference.data.batch_loader import BatchLoader
from inference.engine.process_group import gathered
from inference.model.elbo import Model
from inference.optim.initialization.strategies import InitStrategy
from inference.optim.schedules import LearningRate, TemperingSchedule
from inference.posterior import Posterior
from inference.storage.checkpoint import Checkpoint
from inference.svi.callbacks.base import Callback, opened
from inference.svi.options import FitOptions, FitProblem, require_same_fit
from inference.svi.restarts import Restarts

__all__ = ["fit", "run_fit"]


def fit(  # noqa: PLR0913 - public: every option by its name
    model: Model,
    guide: Model,
    *data: Any,
    steps: int = 10_000,
    lr: LearningRate | None = None,
    optimizer: str | Callable[..., Optimizer] | None = None,
    init: InitStrategy = "auto",
    stop: str = "auto",
    particles: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    engine: str = "auto",
    anneal: int | TemperingSchedule | None = None,
    restarts: int = 1,
    checkpoint: str | Path | Checkpoint | None = None,
    resume: bool = False,
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
        a function that draws them anew at each step; or :func:`~inference.batches`
        of rows that do not fit into memory, which arrays on disk (memory-mapped, of
        Zarr or HDF5) become where there is a ``batch_size``.
    steps
        Optimiser steps.
    lr
        The step size: a number, or a function of the step (from 0) that returns
        one, such as :func:`cosine_decay`; 0.01 if left out.
    optimizer
        ``"adam"``, ``"adamw"``, ``"clippedadam"``, ``"sgd"``, or a callable that
        takes ``([θ], lr=lr)``; or ``"auto"``, which finds how to step and when to
        stop (``steps`` is then the most): a Normal guide or a flow on all rows from the
        mode, in coordinates in which the posterior is round (:class:`~inference.optim.averaged_adam.AveragedAdam`);
        any other, and where there is no mode, from where it is, by
        :class:`~inference.optim.prodigy.Prodigy`. ``posterior.stop_reason`` says
        how it ended. It is what is done if left out, unless ``steps`` are below
        1,000 or ``lr`` or ``anneal`` are given: those fits are Adam's.
    init
        Where the guide starts: ``"mode"``, at a mode of the unconstrained log joint,
        which is searched, with the curvature's spread; ``{site: value}``, with the
        values in the model's own space, other sites where the guide has them; or
        ``"prior"``, where the guide starts of itself, which for Pyro's autoguides is
        the prior's median. ``"auto"`` searches the mode where the steps are found
        too, and takes the best Normal on the way where there is none; else it is ``"prior"``.
    stop
        ``"converged"`` ends when the guide wanders in place and the ELBO no longer
        rises, with ``steps`` as the most, and goes with steps that are found;
        ``"steps"`` takes them all. ``"auto"`` is the first where it can be, else the second.
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
        where that is expected to be sooner done (see :func:`~inference.engine.selection.worth_compiling`).
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
        the same engine would make without restarts. Compiled, they run as one
        program, unless there are callbacks or a checkpoint. For all of them ask
        :func:`~inference.fit_many` for as many seeds.
    checkpoint
        A folder in which the fit keeps its state every half minute, when it ends, and
        when it is interrupted or fails; or :class:`Checkpoint`, which says how often.
        What a guide or model keeps beside its parameters is not in it.
    resume
        Go on with what is in the folder, to the same numbers, bit for bit, as a fit
        that was never interrupted; from the start where there is nothing yet.
        Model, guide, data and options must be the same, but a fit of a constant
        step size may be given more steps.
    progress
        Show a bar with the step, the ELBO and steps a second.
    callbacks
        Each is called with a :class:`~inference.svi.callbacks.base.Progress` after every 100
        steps and at the end, or as :func:`every` says. A value that the model
        reads from outside may be changed there; the compiled engine notices
        and records the model again. Where every callback promises by an attribute
        ``only_looks = True`` to change nothing, it does not look, and calls them
        up to a tenth of a second late, with what was there at their step. One
        that is a context manager is entered before anything else is done, where
        it can still refuse, and left once when the fit has ended, with the
        exception if it failed.

    The first Ctrl-C or SIGTERM ends the fit after the steps at hand, with a
    warning and the posterior so far, whose ``stop_reason`` says so; a second one does
    what it does elsewhere. Where the program has handlers of its own, those are heard instead.

    In an initialised process group of ``torch.distributed`` all of its processes call
    ``fit`` with the same arguments and share the rows of each step
    (:class:`~inference.engine.data_parallel.DataParallel`): what they find is what one process would,
    to rounding, but where rows have noise of their own. It needs a model with such a
    plate as ``batch_size`` does. The first process alone reads and writes the
    checkpoint, calls callbacks, prints and warns.

    Raises
    ------
    ConnectionError
        In all other processes, if one of several is killed, raises, or does not answer.
    NonFinite
        If a loss or gradient is not finite: with step, site and parameter, the
        values behind it, and as ``error.posterior`` the posterior after the last good step.
    OSError
        If a checkpoint cannot be written; ``error.posterior`` is the posterior so far,
        and the checkpoint before is still there.
    ValueError
        If an argument, a column of the data, or a site is unfit; the message
        names it. Also if a checkpoint is there that nobody asked to go on with, one
        of another fit, with what differs, or one that another fit is writing to; and
        under ``engine="compiled"`` if the model cannot be compiled, with the reason.

    References
    ----------
    Hoffman, Blei, Wang, Paisley (2013), Stochastic variational inference.
    Rezende, Mohamed (2015), Variational inference with normalizing flows (annealing).

    Examples
    --------
    >>> import torch
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
    >>> y = 2.0 * x[:, 0] + 1.0
    >>> posterior = fit(linear_regression, mean_field_normal(linear_regression), x, y, steps=500, progress=False)
    >>> posterior.losses.shape
    (500,)
    >>> sorted(posterior.sample(10))
    ['bias', 'noise', 'weights']
    """
    options = FitOptions(
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        init=init,
        stop=stop,
        particles=particles,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        engine=engine,
        anneal=anneal,
        restarts=restarts,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
        callbacks=callbacks,
    )
    return run_fit(FitProblem.of(model, guide, data, options), options)


def run_fit(problem: FitProblem, options: FitOptions) -> Posterior:
    """Fit a checked problem under checked options, as :func:`fit` does."""
    with ExitStack() as stack:
        group = stack.enter_context(gathered(problem.device))
        if isinstance(problem.data, BatchLoader):
            stack.callback(problem.data.close)
        if group is not None:
            require_same_fit(group, problem, options)
            if not group.leads:
                options = replace(options, callbacks=(), progress=False)
        restarts = Restarts(problem, options, group)
        resumed = restarts.resume(stack)
        stack.enter_context(opened(options.callbacks, resumed))
        best, losses = restarts.best()
    return best.posterior(restarts.seconds, losses)
