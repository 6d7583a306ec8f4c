"""One start of a fit, and the best of those that have ended."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor

from inference.data.batch_loader import BatchLoader
from inference.model.bound_model import BoundModel
from inference.optim.adaptive import StopReason
from inference.posterior import Posterior
from inference.predictive.approximation import FitRecord
from inference.svi.callbacks.base import settled
from inference.utils.random_state import RandomStream

__all__ = ["Restart", "RestartResults"]


@dataclass
class Restart:
    """One start: where it is, and once it has ended its losses and KL, (2, steps)."""

    number: int
    bound_model: BoundModel
    args: tuple[Any, ...]
    flat_params: Tensor
    stream: RandomStream
    names: list[str]
    seed: int
    options: dict[str, Any]
    curves: Tensor = field(default_factory=lambda: torch.empty(2, 0))
    stop: StopReason | None = None
    searched: int = 0
    batches: BatchLoader | None = None

    @property
    def loss(self) -> float:
        """−ELBO in nats, where the start ended."""
        return settled(self.curves[0])

    def posterior(
        self, flat_params: Tensor, curves: Tensor, seconds: float, starts: tuple[float, ...] = ()
    ) -> Posterior:
        """The posterior at θ = ``flat_params``, after the steps with these losses and KL."""
        values, kl = curves.clone().cpu().numpy()
        evaluations = self.searched + len(values) * int(self.options["particles"])
        record = FitRecord(values, kl, seconds, self.seed, self.options, starts, evaluations, self.stop)
        bound_model, finished = _finish(self.bound_model, flat_params.detach(), self.args, self.stream)
        return Posterior(bound_model, finished, self.args, self.names, record, batches=self.batches)

    def saved(self) -> dict[str, Any]:
        """What it has found, as numbers and tensors, for :meth:`restore`."""
        return {
            "number": self.number,
            "flat": self.flat_params,
            "curves": self.curves,
            "stop": None if self.stop is None else asdict(self.stop),
            "searched": self.searched,
            "options": self.options,
            "stream": self.stream.saved(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Be what was saved."""
        self.flat_params, self.curves = (saved[name].to(self.flat_params.device) for name in ("flat", "curves"))
        self.stop = None if saved["stop"] is None else StopReason(**saved["stop"])
        self.searched, self.options = saved["searched"], saved["options"]
        self.stream = RandomStream.restored(saved["stream"])


@dataclass
class RestartResults:
    """The starts that have ended: −ELBO of each in nats, infinite where one failed, and the best of them."""

    losses: list[float] = field(default_factory=list)
    best: Restart | None = None

    def add(self, fitted: Restart | None) -> None:
        """Count one more, None where it failed."""
        self.losses.append(math.inf if fitted is None else fitted.loss)
        if fitted is not None and (self.best is None or fitted.loss < self.best.loss):
            self.best = fitted

    def saved(self) -> dict[str, Any]:
        """The losses, and what the best has found."""
        return {"losses": self.losses, "best": None if self.best is None else self.best.saved()}


def _finish(
    bound_model: BoundModel, flat_params: Tensor, args: tuple[Any, ...], stream: RandomStream
) -> tuple[BoundModel, Tensor]:
    """Turn the mode that AutoLaplaceApproximation found into its Normal; other guides stay as they are."""
    if not isinstance(bound_model.guide, AutoLaplaceApproximation):
        return bound_model, flat_params
    with bound_model.running(flat_params, stream):
        normal = bound_model.guide.laplace_approximation(*args)
        values = {f"AutoMultivariateNormal.{k}": getattr(normal, k) for k in ("loc", "scale", "scale_tril")}
    guide = AutoMultivariateNormal(bound_model.guide.model)
    finished = BoundModel.start(bound_model.model, guide, args, stream, bound_model.device, bound_model.dtype)
    kept = bound_model.params.constrained(flat_params)
    return finished, finished.params.unconstrained({**kept, **values})
