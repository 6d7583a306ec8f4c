"""Steps within a chunk after which θ is kept, so that what looks at it can look later."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["IterateRecorder"]


@dataclass
class IterateRecorder:
    """``until(step)`` is the next step to keep; ``kept`` are step, time by ``perf_counter`` and θ of those reached."""

    until: Callable[[int], int]
    kept: list[tuple[int, float, Tensor]] = field(default_factory=list)

    def keep(self, step: int, flat_params: Tensor) -> None:
        """Copy θ as it is after ``step`` steps."""
        self.kept.append((step, time.perf_counter(), flat_params.detach().clone()))
