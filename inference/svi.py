"""Stochastic variational inference: ``fit`` and the eager engine under it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from inference.arguments import argument_names, as_device, as_dtype, as_tensors, positive_integer, positive_number
from inference.isolation import RandomStream
from inference.minibatch import MiniBatch
from inference.objective import Model, loss, traces
from inference.posterior import FitRecord, Posterior
from inference.program import Program
from inference.sites import refuse_non_finite

__all__ = ["OPTIMIZERS", "SVI", "Progress", "SVIState", "cosine_decay", "fit"]

CHUNK = 100
LearningRate = float | Callable[[int], float]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Progress:
    """What a callback is told between chunks of steps."""

    step: int
    steps: int
    losses: Tensor
    seconds: float


@dataclass
class SVIState:
    """All that changes while a fit runs: θ, its gradient, the optimiser and the random stream."""

    flat: Tensor
    grad: Tensor
    optimizer: Optimizer
    stream: RandomStream
    step: int = 0


class SVI:
    """The eager engine: ``init``, then ``advance`` by any number of steps, over an explicit state.

    θ is one flat tensor that every parameter is a view of, so a step is one
    backward pass into one gradient and one fused update.
    """

    def __init__(
        self,
        program: Program,
        args: tuple[Any, ...],
        *,
        optimizer: str | Callable[..., Optimizer] = "adam",
        lr: LearningRate = 0.01,
        particles: int = 1,
        batch_size: int | None = None,
    ) -> None:
        self.program = program
        self.args = args
        self.optimizer = optimizer
        self.lr = lr
        self.particles = particles
        self.batch = MiniBatch(_rows(args), batch_size) if batch_size is not None else None
        self.model = program.model if self.batch is None else self.batch(program.model)
        self.guide = program.guide if self.batch is None else self.batch(program.guide)

    def init(self, stream: RandomStream) -> SVIState:
        """The state before the first step."""
        flat = self.program.params.flatten().requires_grad_(True)
        flat.grad = torch.zeros_like(flat)
        self._check_batch(flat.detach(), stream)
        first = self.lr(0) if callable(self.lr) else self.lr
        return SVIState(flat, flat.grad, make_optimizer(self.optimizer, flat, first), stream)

    def _check_batch(self, flat: Tensor, stream: RandomStream) -> None:
        if self.batch is None:
            return
        with self.program.running(flat, RandomStream(dict(stream.state))):
            traces(self.model, self.guide, self.args)
        self.batch.require_use()

    def advance(self, state: SVIState, steps: int) -> Tensor:
        """Take ``steps`` steps in place and return their losses (−ELBO in nats), shape (steps,).

        Raises
        ------
        ValueError
            At the first loss that is not finite, naming the step and the site;
            the state is put back to where this call began.
        """
        before = _snapshot(state)
        losses = torch.empty(steps, dtype=state.flat.dtype, device=state.flat.device)
        with self.program.running(state.flat.detach(), state.stream, state.grad):
            for i in range(steps):
                losses[i] = self._step(state, state.step + i)
        if not torch.isfinite(losses).all():
            bad = int((~torch.isfinite(losses)).nonzero()[0])
            _roll_back(state, before)
            self._explain(state, bad)
        state.step += steps
        return losses

    def _step(self, state: SVIState, step: int) -> Tensor:
        state.grad.zero_()
        if callable(self.lr):
            for group in state.optimizer.param_groups:
                group["lr"] = self.lr(step)
        value = loss(self.model, self.guide, self.args, self.particles, self.program.reparameterized)
        if value.requires_grad:
            value.backward()
            state.optimizer.step()
        return value.detach()

    def _explain(self, state: SVIState, steps: int) -> None:
        """Replay ``steps`` good steps, then look at each site of the one that failed."""
        start = _snapshot(state)
        where = f"at step {state.step + steps}"
        try:
            with self.program.running(state.flat.detach(), state.stream, state.grad):
                for i in range(steps):
                    self._step(state, state.step + i)
                for _ in range(self.particles):
                    refuse_non_finite(*traces(self.model, self.guide, self.args), where)
        finally:
            _roll_back(state, start)
        raise ValueError(f"the loss is not finite {where}: use a smaller lr= or look for overflow in the model")


def cosine_decay(lr: float, steps: int) -> Callable[[int], float]:
    """Step sizes that fall from ``lr`` to 0 over ``steps`` as half a cosine, for ``fit(..., lr=…)``.

    Loshchilov, Hutter (2017), SGDR: Stochastic gradient descent with warm restarts.

    >>> schedule = cosine_decay(0.02, 1000)
    >>> schedule(0), round(schedule(500), 6), round(schedule(999), 6)
    (0.02, 0.01, 0.0)
    """

    def cosine(step: int) -> float:
        return 0.5 * lr * (1 + math.cos(math.pi * min(step, steps) / steps))

    return cosine


def make_optimizer(optimizer: str | Callable[..., Optimizer], flat: Tensor, lr: float) -> Optimizer:
    """One optimiser over the flat vector: a name of :data:`OPTIMIZERS`, or ``optimizer([θ], lr=lr)``."""
    if callable(optimizer):
        return optimizer([flat], lr=lr)
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer is {optimizer!r}: pass one of {sorted(OPTIMIZERS)} or a callable such as torch.optim.RAdam"
        )
    return OPTIMIZERS[optimizer]([flat], lr=lr, fused=True)


def _rows(args: tuple[Any, ...]) -> int:
    sizes = [len(value) for value in args if isinstance(value, Tensor) and value.dim() > 0]
    if not sizes:
        raise ValueError("batch_size needs data with rows, but no argument is an array: leave batch_size out")
    return sizes[0]


def _snapshot(state: SVIState) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    moments = {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        for key, entry in state.optimizer.state_dict()["state"].items()
    }
    return state.flat.detach().clone(), moments, dict(state.stream.state)


def _roll_back(state: SVIState, snapshot: tuple[Tensor, dict[str, Any], dict[str, Any]]) -> None:
    flat, moments, stream = snapshot
    with torch.no_grad():
        state.flat.copy_(flat)
    groups = state.optimizer.state_dict()["param_groups"]
    copies = {key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in e.items()} for key, e in moments.items()}
    state.optimizer.load_state_dict({"state": copies, "param_groups": groups})
    state.stream.state = dict(stream)


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
        ``"eager"``, or ``"auto"``, which today is the same.
    progress
        Show a bar with the step, the ELBO and steps a second.
    callbacks
        Each is called with a :class:`Progress` after every 100 steps.

    Raises
    ------
    ValueError
        If an argument, a column of the data, or a site is unfit; the message
        names it. Also if the loss stops being finite, with step and site.

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
    if engine not in ("auto", "eager"):
        raise ValueError(f"engine is {engine!r}: pass 'auto' or 'eager'")
    where, kind = as_device(device), as_dtype(dtype)
    names = argument_names(model, len(data))
    args = as_tensors(data, names, where, kind)
    stream = RandomStream.seeded(seed)
    program = Program.start(model, guide, args, stream, where, kind)
    svi = SVI(program, args, optimizer=optimizer, lr=lr, particles=particles, batch_size=batch_size)
    state = svi.init(stream)
    started = time.perf_counter()
    losses = _run(svi, state, steps, progress, callbacks)
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
            "engine": "eager",
        },
    )
    program, flat = _finish(program, state.flat.detach(), args, stream)
    return Posterior(program, flat, args, names, record)


def _run(
    svi: SVI, state: SVIState, steps: int, progress: bool, callbacks: Sequence[Callable[[Progress], None]]
) -> Tensor:
    started = time.perf_counter()
    chunks = []
    with tqdm(total=steps, unit="step", disable=not progress, desc="fit") as bar:
        while state.step < steps:
            chunk = svi.advance(state, min(CHUNK, steps - state.step))
            chunks.append(chunk)
            bar.set_postfix(elbo=f"{-chunk.mean().item():.4g}", refresh=False)
            bar.update(len(chunk))
            for callback in callbacks:
                callback(Progress(state.step, steps, chunk, time.perf_counter() - started))
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
