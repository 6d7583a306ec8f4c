"""Whether the ELBO had settled when a fit ended."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["Convergence", "convergence"]


@dataclass(frozen=True)
class Convergence:
    """The ELBO at the end of a fit: what the last quarter of the steps gained over the quarter before.

    ``gain`` and its standard error ``gain_se`` are in nats; ``converged`` when
    the gain is below ``threshold`` or below two standard errors.
    """

    gain: float
    gain_se: float
    threshold: float
    converged: bool


def convergence(losses: np.ndarray) -> Convergence:
    """Compare the last quarter of the losses with the quarter before, by means of 20 blocks each."""
    window = len(losses) // 4
    if window < 50:
        return Convergence(math.nan, math.nan, math.nan, False)
    late, early = losses[-window:], losses[-2 * window : -window]
    gain = float(np.mean(early) - np.mean(late))
    gain_se = math.hypot(_standard_error(late), _standard_error(early))
    threshold = 0.5
    return Convergence(gain, gain_se, threshold, gain < max(threshold, 2 * gain_se))


def _standard_error(losses: np.ndarray, blocks: int = 20) -> float:
    means = [block.mean() for block in np.array_split(losses, blocks)]
    return float(np.std(means, ddof=1) / math.sqrt(blocks))
