"""A step size that is found from the steps themselves, for fits without a start: Prodigy, then linearly to 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inference.optim.adaptive import AdaptiveOptimizer, StopReason
from inference.optim.convergence import Convergence, convergence

__all__ = ["Prodigy"]

_FIRST_MOMENT, _SECOND_MOMENT, _EPSILON = 0.9, 0.999, 1e-8
_KEEP = math.sqrt(_SECOND_MOMENT)
_DISTANCE = 1e-5  # d before the first step
_GROWTH, _RANGE = 1.02, 1e5  # of d in a step, but never so slow that a quarter of the steps is less than this range
_WARM = 100
_FIRST, _APART = 1000, 1.1  # the least step of a look, and the ratio of a look's step to that of the look before
_AIM, _NOISE = 0.5, 0.02  # nats, and standard deviations of one loss: what the ELBO may gain and be flat


class Prodigy(AdaptiveOptimizer):
    """Prodigy: Adam with d as its step, a lower bound of how far away the optimum is, which grows on the way.

    With g the gradient of −ELBO at θ, b = √β₂ and γ the schedule,

        m ← β₁m + (1−β₁)dg,  v ← β₂v + (1−β₂)d²g²,
        r ← br + (1−b)γd²⟨g, θ₀ − θ⟩,  s ← bs + (1−b)γd²g,
        θ ← θ − γ √(1−β₂ᵗ)/(1−β₁ᵗ) · dm/(√v + dε),
        d ← min(max(d, r/‖s‖₁), cd),

    where c = 1.02 keeps d from what the first, steepest steps say. γ is 1 while
    the ELBO rises, then falls linearly to 0 over as many steps again: at the
    latest over the second half of ``steps``; before, where ``stop_early``, when the
    last quarter of the steps so far is known to have gained no more than half a
    nat, or a fiftieth of the standard deviation of one loss, over the quarter
    before. A flat stretch of a long fit says little, so a quarter of ``steps`` is
    the first look.

    References
    ----------
    Mishchenko, Defazio (2024), Prodigy: An expeditiously adaptive parameter-free learner.
    Defazio et al. (2023), Optimal linear decay learning rate schedules and further refinements.
    Hägele et al. (2024), Scaling laws and compute-optimal training beyond fixed training durations.
    """

    moments = ("exp_avg", "exp_avg_sq", "slopes", "first", "gained", "distance")

    def __init__(self, theta: Tensor, steps: int, stop_early: bool = True) -> None:
        super().__init__(theta, steps)
        self.settling = steps - steps // 2
        few = f"{steps:,} steps are too few to see whether the ELBO had settled"
        self.stop = StopReason(
            False, few if stop_early else f"all {steps:,} steps were taken, as was asked", None, None
        )
        self._growth = max(_GROWTH, _RANGE ** (4 / steps))
        self._decided = not stop_early or steps < 2 * _FIRST  # then there is no time to look
        self._next = max(_FIRST, steps // 4)

    def step_size(self, step: int) -> float:
        """γ."""
        left = 1.0 if step < self.settling else (self.steps - step) / (self.steps - self.settling)
        return left * min(1.0, (step + 1) / _WARM)

    def init(self, theta: Tensor) -> list[Tensor]:
        """m, v, s, θ₀, and the single numbers r and d, (1,) each."""
        zeros = [torch.zeros_like(theta) for _ in range(3)]
        return [*zeros, theta.detach().clone(), theta.new_zeros(1), theta.new_full((1,), _DISTANCE)]

    def hyperparameters(self, step: int) -> tuple[float, ...]:
        """γ, and γ√(1−β₂ᵗ)/(1−β₁ᵗ)."""
        size = self.step_size(step)
        return size, size * math.sqrt(1 - _SECOND_MOMENT ** (step + 1)) / (1 - _FIRST_MOMENT ** (step + 1))

    def update(self, theta: Tensor, grad: Tensor, moments: list[Tensor], hyperparameters: Tensor) -> None:
        """Change θ and the moments in place."""
        mean, square, slopes, first, gained, distance = moments
        mean.copy_(mean * _FIRST_MOMENT + (1 - _FIRST_MOMENT) * distance * grad)
        square.copy_(square * _SECOND_MOMENT + (1 - _SECOND_MOMENT) * (distance * grad).square())
        weight = (1 - _KEEP) * hyperparameters[0] * distance * distance
        gained.copy_(gained * _KEEP + weight * (grad * (first - theta)).sum())
        slopes.copy_(slopes * _KEEP + weight * grad)
        theta.sub_(hyperparameters[1] * distance * mean / (square.sqrt() + distance * _EPSILON))
        known = gained / slopes.abs().sum().clamp_min(torch.finfo(theta.dtype).tiny)
        distance.copy_(torch.minimum(torch.maximum(distance, known), distance * self._growth))

    def state_dict(self) -> dict[str, Any]:
        """With the step of the next look."""
        return {**super().state_dict(), "next": self._next}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        super().load_state_dict(saved)
        self._next = saved["next"]

    def look(self, step: int, points: list[Tensor], losses: Tensor) -> None:
        """Judge the losses so far at steps that lie a tenth apart; end the phase of γ = 1."""
        last = step >= self.settling
        if self._decided or not (last or step >= self._next):
            return
        self._next = math.ceil(step * _APART)
        seen = losses[:step].double().cpu().numpy()
        state, aim = convergence(seen), max(_AIM, _NOISE * float(seen[-(step // 4) :].std()))
        flat_params = abs(state.gain) + 2 * state.gain_se < aim
        if flat_params and not last:
            self.settling, self.steps = step, min(2 * step, self.ceiling)
        if flat_params or last:
            self.stop, self._decided = _stop(step, state, aim, flat_params), True


def _stop(step: int, state: Convergence, aim: float, flat_params: bool) -> StopReason:
    figures = f"{state.gain:.2g} ± {state.gain_se:.1g} nats between two quarters of the steps"
    if flat_params:
        return StopReason(True, f"after {step:,} steps, at which the ELBO was flat: {figures}", None, None)
    return StopReason(
        False, f"the ceiling of steps was reached: a gain of {figures} is not known to be below {aim:.2g}", None, None
    )
