"""Optimisers over one flat parameter vector, and schedules of their step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "OPTIMIZERS",
    "LearningRate",
    "as_schedule",
    "cosine_decay",
    "make_optimizer",
    "optimizer_class",
    "set_step_size",
]

LearningRate = float | Callable[[int], float]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "clippedadam": ClippedAdam,
    "sgd": partial(torch.optim.SGD, fused=True),
}


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


def as_schedule(lr: Callable[[int], float], steps: int) -> Callable[[int], float]:
    """A function of the step, if its first and last step sizes are finite numbers of at least 0.

    Raises
    ------
    ValueError
        If they are not, or it cannot be called with a step.
    """
    for step in (0, steps - 1):
        try:
            size = lr(step)
        except Exception as error:
            raise ValueError(f"lr cannot be called with step {step}: {error}; give a function of the step") from error
        if not isinstance(size, int | float | np.number) or not 0 <= size < math.inf:
            raise ValueError(f"lr gives {size!r} at step {step}: return a step size of at least 0")
    return lr


def optimizer_class(optimizer: str | Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """The callable that a name of :data:`OPTIMIZERS` stands for; any other callable as it is.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if callable(optimizer):
        return optimizer
    if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer is {optimizer!r}: pass one of {sorted(OPTIMIZERS)} or a callable such as torch.optim.RAdam"
        )
    return OPTIMIZERS[optimizer]


def make_optimizer(optimizer: str | Callable[..., Optimizer], flat: Tensor, lr: LearningRate) -> Optimizer:
    """One optimiser over the flat vector: ``optimizer([θ], lr=lr)``, or the one of that name.

    Raises
    ------
    ValueError
        If the call fails, or makes no optimiser.
    """
    try:
        made = optimizer_class(optimizer)([flat], lr=lr(0) if callable(lr) else lr)
    except TypeError as error:
        raise ValueError(f"optimizer cannot be called as optimizer([θ], lr=…): {error}") from error
    if not isinstance(made, Optimizer):
        raise ValueError(f"optimizer gives {made!r}: pass a callable that makes a torch.optim.Optimizer")
    return made


def set_step_size(optimizer: Optimizer, lr: LearningRate, step: int) -> None:
    """Follow the schedule, where ``lr`` is one."""
    if callable(lr):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
