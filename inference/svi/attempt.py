"""One start of a fit, and the best of those that have ended."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor

from inference.data.batch_loader import BatchStream
from inference.model.bound_model import Program
from inference.optim.adaptive import Stop
from inference.posterior import Posterior
from inference.predictive.fit_record import FitRecord
from inference.svi.callbacks.base import settled
from inference.utils.random_state import RandomStream

__all__ = ["Attempt", "Ended"]


@dataclass
class Attempt:
    """One start: where it is, and once it has ended its losses and KL, (2, steps)."""

    number: int
    program: Program
    args: tuple[Any, ...]
    flat: Tensor
    stream: RandomStream
    names: list[str]
    seed: int
    options: dict[str, Any]
    curves: Tensor = field(default_factory=lambda: torch.empty(2, 0))
    stop: Stop | None = None
    searched: int = 0
    batches: BatchStream | None = None

    @property
    def loss(self) -> float:
        """−ELBO in nats, where the start ended."""
        return settled(self.curves[0])

    def posterior(self, flat: Tensor, curves: Tensor, seconds: float, starts: tuple[float, ...] = ()) -> Posterior:
        """The posterior at θ = ``flat``, after the steps with these losses and KL."""
        values, kl = curves.clone().cpu().numpy()
        evaluations = self.searched + len(values) * int(self.options["particles"])
        record = FitRecord(values, kl, seconds, self.seed, self.options, starts, evaluations, self.stop)
        program, finished = _finish(self.program, flat.detach(), self.args, self.stream)
        return Posterior(program, finished, self.args, self.names, record, batches=self.batches)

    def saved(self) -> dict[str, Any]:
        """What it has found, as numbers and tensors, for :meth:`restore`."""
        return {
            "number": self.number,
            "flat": self.flat,
            "curves": self.curves,
            "stop": None if self.stop is None else asdict(self.stop),
            "searched": self.searched,
            "options": self.options,
            "stream": self.stream.saved(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Be what was saved."""
        self.flat, self.curves = (saved[name].to(self.flat.device) for name in ("flat", "curves"))
        self.stop = None if saved["stop"] is None else Stop(**saved["stop"])
        self.searched, self.options = saved["searched"], saved["options"]
        self.stream = RandomStream.restored(saved["stream"])


@dataclass
class Ended:
    """The starts that have ended: −ELBO of each in nats, infinite where one failed, and the best of them."""

    losses: list[float] = field(default_factory=list)
    best: Attempt | None = None

    def add(self, fitted: Attempt | None) -> None:
        """Count one more, None where it failed."""
        self.losses.append(math.inf if fitted is None else fitted.loss)
        if fitted is not None and (self.best is None or fitted.loss < self.best.loss):
            self.best = fitted

    def saved(self) -> dict[str, Any]:
        """The losses, and what the best has found."""
        return {"losses": self.losses, "best": None if self.best is None else self.best.saved()}


def _finish(program: Program, flat: Tensor, args: tuple[Any, ...], stream: RandomStream) -> tuple[Program, Tensor]:
    """Turn the mode that AutoLaplaceApproximation found into its Normal; other guides stay as they are."""
    if not isinstance(program.guide, AutoLaplaceApproximation):
        return program, flat
    with program.running(flat, stream):
        normal = program.guide.laplace_approximation(*args)
        values = {f"AutoMultivariateNormal.{k}": getattr(normal, k) for k in ("loc", "scale", "scale_tril")}
    guide = AutoMultivariateNormal(program.guide.model)
    finished = Program.start(program.model, guide, args, stream, program.device, program.dtype)
    kept = program.params.constrained(flat)
    return finished, finished.params.unconstrained({**kept, **values})
