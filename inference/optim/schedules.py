"""Numbers that depend on the step: learning rates, and the power that an annealed target is raised to."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from inference.utils.validation import positive_integer

__all__ = ["LearningRate", "TemperingSchedule", "as_schedule", "as_tempering_schedule", "cosine_decay"]

LearningRate = float | Callable[[int], float]
TemperingSchedule = Callable[[int], float]
_START = 0.01  # power of an annealed target before the first step


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


def as_tempering_schedule(anneal: int | TemperingSchedule | None, steps: int) -> TemperingSchedule | None:
    """β by step: the power that the target p(x, z) is raised to, for ``fit(..., anneal=…)``.

    A number of steps is how long β rises in a straight line from 0.01 to 1,
    as in Rezende, Mohamed (2015), equation 20.

    >>> rise = as_tempering_schedule(100, steps=300)
    >>> rise(0), rise(50), rise(200)
    (0.01, 0.505, 1.0)

    Raises
    ------
    ValueError
        If β does not reach 1 within ``steps``, or is not a number from 0 to 1.
    """
    if anneal is None:
        return None
    power = anneal if callable(anneal) else partial(_line, positive_integer(anneal, "anneal"))
    for step in (0, steps - 1):
        try:
            value = power(step)
        except Exception as error:
            raise ValueError(
                f"anneal cannot be called with step {step}: {error}; give a function of the step"
            ) from error
        if not (isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"anneal gives {value!r} at step {step}: the power of the target goes from 0 to 1")
    if value != 1:
        raise ValueError(
            f"anneal ends at {value:.3g} at the last of {steps} steps, so that the fit would be of a "
            "flattened target: let it reach 1 before, or give more steps"
        )
    return power


def _line(length: int, step: int) -> float:
    return min(1.0, _START + (1 - _START) * step / length)
