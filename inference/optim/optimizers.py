"""Optimisers over one flat parameter vector, and schedules of their step size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer

from inference.optim.schedules import LearningRate

__all__ = [
    "OPTIMIZERS",
    "make_optimizer",
    "optimizer_class",
    "set_step_size",
]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "clippedadam": ClippedAdam,
    "sgd": partial(torch.optim.SGD, fused=True),
}


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


def make_optimizer(optimizer: str | Callable[..., Optimizer], flat_params: Tensor, lr: LearningRate) -> Optimizer:
    """One optimiser over the flat vector: ``optimizer([θ], lr=lr)``, or the one of that name.

    Raises
    ------
    ValueError
        If the call fails, or makes no optimiser.
    """
    try:
        made = optimizer_class(optimizer)([flat_params], lr=lr(0) if callable(lr) else lr)
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
