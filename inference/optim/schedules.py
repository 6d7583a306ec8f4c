"""Learning rates that depend on the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

__all__ = ["LearningRate", "as_schedule", "cosine_decay"]

LearningRate = float | Callable[[int], float]


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
