"""Optimisers over one flat parameter vector, by name or by call, and their steps as tensor operations that compile."""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer

from inference.optim.schedules import LearningRate

__all__ = ["OPTIMIZERS", "Update", "Updating", "make_optimizer", "optimizer_class", "set_step_size", "update_of"]

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


class Update(ABC):
    """One optimiser's step: ``update`` runs on tensors, ``hyperparameters`` are its numbers that change by the step."""

    moments: tuple[str, ...] = ()

    def __init__(self, group: dict[str, Any], lr: LearningRate) -> None:
        self.group = group
        self.lr = lr

    def step_size(self, step: int) -> float:
        """The learning rate at ``step``, counted from 0."""
        return self.lr(step) if callable(self.lr) else self.lr

    def init(self, theta: Tensor) -> list[Tensor]:
        """The moments before the first step, at θ, (P,)."""
        return [torch.zeros_like(theta) for _ in self.moments]

    @abstractmethod
    def hyperparameters(self, step: int) -> tuple[float, ...]:
        """What changes from step to step."""

    @abstractmethod
    def update(self, theta: Tensor, grad: Tensor, moments: list[Tensor], hyperparameters: Tensor) -> None:
        """Change θ and the moments in place."""


class Updating(Optimizer):
    """``update`` as an optimiser of torch over one flat vector, for the engine that calls those."""

    def __init__(self, flat_params: Tensor, update: Update) -> None:
        super().__init__([flat_params], {})
        self._update = update
        begun = zip(update.moments, update.init(flat_params.detach()), strict=True)
        self.state[flat_params] = {"step": 0, **dict(begun)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the vector in place."""
        (flat_params,) = self.param_groups[0]["params"]
        state = self.state[flat_params]
        hyperparameters = torch.tensor(
            self._update.hyperparameters(state["step"]), dtype=flat_params.dtype, device=flat_params.device
        )
        self._update.update(
            flat_params, flat_params.grad, [state[name] for name in self._update.moments], hyperparameters
        )
        state["step"] += 1


class AdamUpdate(Update):
    """m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², θ ← θ − α/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε). Kingma, Ba (2015)."""

    moments = ("exp_avg", "exp_avg_sq")

    def hyperparameters(self, step: int) -> tuple[float, ...]:
        """α/(1−β₁ᵗ) and √(1−β₂ᵗ)."""
        first, second = self.group["betas"]
        count = step + 1
        return self.step_size(step) / (1 - first**count), math.sqrt(1 - second**count)

    def update(self, theta: Tensor, grad: Tensor, moments: list[Tensor], hyperparameters: Tensor) -> None:
        """Change θ, m and v in place."""
        average, square = moments
        first, second = self.group["betas"]
        grad = self.regularise(theta, grad)
        average.add_((grad - average) * (1 - first))
        square.copy_(square * second + (1 - second) * grad * grad)
        theta.sub_(hyperparameters[0] * average / (square.sqrt() / hyperparameters[1] + self.group["eps"]))

    def regularise(self, theta: Tensor, grad: Tensor) -> Tensor:
        """Weight decay as a part of the gradient."""
        decay = self.group["weight_decay"]
        return grad + decay * theta if decay else grad


class AdamWUpdate(AdamUpdate):
    """Adam with θ ← (1 − αλ)θ before the step. Loshchilov, Hutter (2019)."""

    def hyperparameters(self, step: int) -> tuple[float, ...]:
        """Adam's two, and 1 − αλ."""
        return *super().hyperparameters(step), 1 - self.step_size(step) * self.group["weight_decay"]

    def update(self, theta: Tensor, grad: Tensor, moments: list[Tensor], hyperparameters: Tensor) -> None:
        """Shrink θ, then step as Adam does."""
        theta.mul_(hyperparameters[2])
        super().update(theta, grad, moments, hyperparameters)

    def regularise(self, theta: Tensor, grad: Tensor) -> Tensor:
        """Nothing: θ has been shrunk already."""
        return grad


class ClippedAdamUpdate(Update):
    """Pyro's ClippedAdam: each gradient clipped to ±c, α multiplied by ``lrd`` at every step."""

    moments = ("exp_avg", "exp_avg_sq")

    def hyperparameters(self, step: int) -> tuple[float, ...]:
        """α√(1−β₂ᵗ)/(1−β₁ᵗ)."""
        first, second = self.group["betas"]
        count = step + 1
        decays = 1 if callable(self.lr) else count
        lr = self.step_size(step) * self.group["lrd"] ** decays
        return (lr * math.sqrt(1 - second**count) / (1 - first**count),)

    def update(self, theta: Tensor, grad: Tensor, moments: list[Tensor], hyperparameters: Tensor) -> None:
        """Clip, then change θ, m and v in place."""
        average, square = moments
        first, second = self.group["betas"]
        grad = grad.clamp(-self.group["clip_norm"], self.group["clip_norm"])
        if self.group["weight_decay"]:
            grad = grad + self.group["weight_decay"] * theta
        average.copy_(average * first + (1 - first) * grad)
        spread = grad - average if self.group["centered_variance"] else grad
        square.copy_(square * second + (1 - second) * spread * spread)
        theta.sub_(hyperparameters[0] * average / (square.sqrt() + self.group["eps"]))


class SGDUpdate(Update):
    """b ← μb + g, θ ← θ − αb, as torch's SGD writes momentum."""

    def __init__(self, group: dict[str, Any], lr: LearningRate) -> None:
        super().__init__(group, lr)
        self.moments = ("momentum_buffer",) if group["momentum"] else ()

    def hyperparameters(self, step: int) -> tuple[float, ...]:
        """α, and the weight of the gradient in the momentum: 1 at the first step, 1 − dampening after."""
        return self.step_size(step), 1.0 if step == 0 else 1 - self.group["dampening"]

    def update(self, theta: Tensor, grad: Tensor, moments: list[Tensor], hyperparameters: Tensor) -> None:
        """Change θ, and the momentum where there is one, in place."""
        if self.group["weight_decay"]:
            grad = grad + self.group["weight_decay"] * theta
        direction = grad
        for buffer in moments:
            buffer.copy_(buffer * self.group["momentum"] + hyperparameters[1] * grad)
            direction = grad + self.group["momentum"] * buffer if self.group["nesterov"] else buffer
        theta.sub_(hyperparameters[0] * direction)


_UPDATES: dict[type[Optimizer], type[Update]] = {
    torch.optim.Adam: AdamUpdate,
    torch.optim.AdamW: AdamWUpdate,
    torch.optim.SGD: SGDUpdate,
    ClippedAdam: ClippedAdamUpdate,
}


def update_of(optimizer: str | Callable[..., Optimizer], lr: LearningRate) -> Update | None:
    """The step of ``optimizer`` with its own options, or None where there is no compiled form of it.

    The optimiser itself is not made where its class and arguments can be read:
    the first one of a process costs most of a second of imports.
    """
    kind, options = _class_and_options(optimizer)
    update = _UPDATES.get(kind) if isinstance(kind, type) else None
    if update is AdamUpdate and options.get("decoupled_weight_decay"):
        update = AdamWUpdate
    if update is None or options.get("amsgrad") or options.get("maximize") or isinstance(options.get("lr"), Tensor):
        return None
    return update(options, lr)


def _class_and_options(optimizer: str | Callable[..., Optimizer]) -> tuple[Any, dict[str, Any]]:
    found: Any = optimizer_class(optimizer)
    given: dict[str, Any] = {}
    while isinstance(found, functools.partial) and not found.args:
        given = {**found.keywords, **given}
        found = found.func
    if found not in _UPDATES:
        return found, {}
    defaults = {name: p.default for name, p in inspect.signature(found).parameters.items()}
    return found, {**defaults, **given}
