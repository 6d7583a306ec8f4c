"""The record of a fit: losses, time, options, why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inference.optim.adaptive import StopReason

__all__ = ["FitRecord"]


@dataclass(frozen=True)
class FitRecord:
    """How a posterior came about: −ELBO and its KL per step, seconds, seed, options, −ELBO where each start ended.

    ``evaluations`` counts gradients of the log joint, those of the search of a
    start and those of steps and particles; ``stop`` says why it ended where
    that was to be found.
    """

    losses: np.ndarray
    kl: np.ndarray
    seconds: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    starts: tuple[float, ...] = ()
    evaluations: int = 0
    stop: StopReason | None = None
