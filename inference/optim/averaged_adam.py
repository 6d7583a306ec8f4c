"""A step size and an end that are found: Adam in whitened coordinates, until it wanders in place, then averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from inference.optim.adaptive import RHAT, AdaptiveOptimizer, StopReason
from inference.optim.convergence import convergence
from inference.optim.whitening import Whitening

__all__ = ["EVERY", "AveragedAdam", "split_rhat"]

EVERY = 10  # steps between two points of the path that are looked at
_LOOK = 100  # steps between two looks
_SIZE = 0.05  # of a step in each φ, whose unit is a posterior standard deviation,
_MOVING = 65  # up to that many, those of ten latents of full rank; more share its length
_WARM = 100
_CLIP = 10.0  # root mean squares at which each entry of a gradient is cut, once warm
_GROWN = 10.0  # times that for the mean square, which has to follow gradients that have grown
_FIRST, _SETTLE = 1000, 1000  # steps before the first look, and of the least settling
_AIM, _MCSE = 0.03, 0.06
_FIRST_MOMENT, _SECOND_MOMENT, _EPSILON = 0.9, 0.999, 1e-8


class AveragedAdam(AdaptiveOptimizer):
    """Adam on φ, θ = θ₀ + Wφ, at one step size, then linearly to 0 while θ is averaged.

    Each φ moves by 0.05 a step, or by less where they are many, so that the
    whole step is never longer than √65 · 0.05 posterior standard deviations:
    what the noise of the gradient costs grows with the square of that length.

    The first phase ends when the split R-hat of all φ over its last half is at
    most 1.1 and the ELBO no longer rises; the second is as long as the averages
    need for a standard error of 0.03 posterior standard deviations. Without
    ``stop_early`` nothing is judged, and the second phase is the last quarter of ``steps``.

    Where φ is not identified, or has many numbers for each latent, ``judged``
    gives what is looked at in its place, (T, F) of θ at T points, (T, P). An
    entry of a gradient is cut at ten times its root mean square so far, at a
    hundred times in that mean square: where q misses a tail, one draw would
    otherwise throw everything far away.

    References
    ----------
    Dhaka et al. (2020), Robust, accurate stochastic optimization for variational inference.
    Defazio et al. (2023), Optimal linear decay learning rate schedules and further refinements.
    Polyak, Juditsky (1992), Acceleration of stochastic approximation by averaging.
    Zhang et al. (2020), Why are adaptive methods good for attention models? (cut gradients)
    """

    moments = ("average", "exp_avg", "exp_avg_sq")
    every = EVERY

    def __init__(
        self,
        whitening: Whitening,
        theta: Tensor,
        steps: int,
        stop_early: bool = True,
        judged: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(theta, steps)
        self.size = _SIZE * min(1.0, math.sqrt(_MOVING / whitening.moving))
        self.settling = steps - min(max(_SETTLE, steps // 4), steps // 2)
        few = f"{steps:,} steps are too few to see whether they had settled"
        self.stop = StopReason(
            False, few if stop_early else f"all {steps:,} steps were taken, as was asked", None, None
        )
        self._map = whitening
        self._judged = judged or (lambda points: whitening.coordinates(points.double() - theta.double()))
        self._decided = not stop_early or steps < _FIRST + _SETTLE  # then there is no time to look
        self._path: list[Tensor] = []

    def step_size(self, step: int) -> float:
        """The size of a step in φ."""
        left = 1.0 if step < self.settling else (self.steps - step) / (self.steps - self.settling)
        return self.size * left * min(1.0, (step + 1) / _WARM)

    def hyperparameters(self, step: int) -> tuple[float, ...]:
        """α/(1−β₁ᵗ), √(1−β₂ᵗ), the weight of θ in its average, and 10/√(1−β₂ᵗ⁻¹) where gradients are cut."""
        weight = 0.0 if step < self.settling else 1 / (step - self.settling + 1)
        first, second = 1 - _FIRST_MOMENT ** (step + 1), 1 - _SECOND_MOMENT ** (step + 1)
        most = _CLIP / math.sqrt(1 - _SECOND_MOMENT**step) if step > _WARM else math.inf
        return self.step_size(step) / first, math.sqrt(second), weight, most

    def update(self, theta: Tensor, grad: Tensor, moments: list[Tensor], hyperparameters: Tensor) -> None:
        """Change θ, its average and Adam's moments in place."""
        average, mean, square = moments
        pulled = self._map.pull(grad)
        most = hyperparameters[3] * (square.sqrt() + _EPSILON)
        mean.copy_(mean * _FIRST_MOMENT + (1 - _FIRST_MOMENT) * pulled.clamp(-most, most))
        scaled = pulled.clamp(-_GROWN * most, _GROWN * most)
        square.copy_(square * _SECOND_MOMENT + (1 - _SECOND_MOMENT) * scaled * scaled)
        theta.sub_(self._map.move(hyperparameters[0] * mean / (square.sqrt() / hyperparameters[1] + _EPSILON)))
        average.add_((theta - average) * hyperparameters[2])

    def result(self, theta: Tensor, moments: list[Tensor]) -> Tensor:
        """θ, averaged over the second phase."""
        return moments[self.moments.index("average")]

    def state_dict(self) -> dict[str, Any]:
        """With the path that the next look judges."""
        return {**super().state_dict(), "path": torch.stack(self._path) if self._path else None}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        super().load_state_dict(saved)
        self._path = [] if saved["path"] is None else list(saved["path"].to(self.theta.device))

    def look(self, step: int, points: list[Tensor], losses: Tensor) -> None:
        """Judge the path so far once in a hundred steps; end a phase."""
        if self._decided:
            return
        if points:
            self._path += self._judged(torch.stack(points))
        if step < _FIRST or step % _LOOK:
            return
        recent = torch.stack(self._path[len(self._path) // 2 :])
        rhat = float(split_rhat(recent).max())
        rising = not convergence(losses[step // 2 :].double().cpu().numpy()).converged
        last = step >= self.settling
        if (not rhat <= RHAT or rising) and not last:
            return
        blocks = recent[: len(recent) // 10 * 10].reshape(-1, 10, recent.shape[1]).mean(1)
        spread = float(blocks.std(0).max())
        wanted = 10 * EVERY * math.ceil(min(float(self.ceiling), (spread / _AIM) ** 2))
        length = min(max(_SETTLE, wanted), self.ceiling - step)
        mcse = spread * math.sqrt(10 * EVERY / max(length, 1))
        self.settling, self.steps, self._decided = step, step + length, True
        self.stop = _stop(step, rhat, mcse, rising)


def _stop(step: int, rhat: float, mcse: float, rising: bool) -> StopReason:
    troubles = []
    if not rhat <= RHAT:
        troubles.append(f"R-hat of the guide is {rhat:.2f}, above {RHAT}")
    if rising:
        troubles.append("the ELBO was still rising")
    if not mcse <= _MCSE:
        troubles.append(f"its averages are known to {mcse:.2f} posterior sds only, above {_MCSE}")
    figures = f"R-hat {rhat:.2f} (at most {RHAT}), averages known to {mcse:.3f} posterior sds"
    if troubles:
        return StopReason(False, f"the ceiling of steps was reached: {'; '.join(troubles)}", rhat, mcse)
    return StopReason(True, f"after {step:,} steps and averaged since: {figures}", rhat, mcse)


def split_rhat(points: Tensor) -> Tensor:
    """Split R-hat of T points of P numbers, (T, P) → (P,): √(1 + (B − W/n)/W), the two halves as chains.

    Gelman et al. (2013), Bayesian data analysis, section 11.4.
    """
    half = len(points) // 2
    chains = torch.stack([points[:half], points[-half:]])
    within = chains.var(1).mean(0)
    between = chains.mean(1).var(0)
    still = within <= 1e-20
    return torch.where(still, 1.0, ((half - 1) / half + between / torch.where(still, 1.0, within)).sqrt())
