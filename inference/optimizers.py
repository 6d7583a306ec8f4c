"""Optimisers over one flat parameter vector, and schedules of their step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OPTIMIZERS", "LearningRate", "cosine_decay", "make_optimizer", "optimizer_class", "set_step_size"]

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


def optimizer_class(optimizer: str | Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """The callable that a name of :data:`OPTIMIZERS` stands for; any other callable as it is.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if callable(optimizer):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer is {optimizer!r}: pass one of {sorted(OPTIMIZERS)} or a callable such as torch.optim.RAdam"
        )
    return OPTIMIZERS[optimizer]


def make_optimizer(optimizer: str | Callable[..., Optimizer], flat: Tensor, lr: LearningRate) -> Optimizer:
    """One optimiser over the flat vector: ``optimizer([θ], lr=lr)``, or the one of that name."""
    return optimizer_class(optimizer)([flat], lr=lr(0) if callable(lr) else lr)


def set_step_size(optimizer: Optimizer, lr: LearningRate, step: int) -> None:
    """Follow the schedule, where ``lr`` is one."""
    if callable(lr):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
