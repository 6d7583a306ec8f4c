"""The attempts of a fit: each from a start of its own, of which the best is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor
from tqdm.auto import tqdm

from inference.automatic import automatic, unplaced
from inference.compiled import CompiledEngine
from inference.engines import choose
from inference.finding import Finding, Stop
from inference.fitted import FitRecord
from inference.init import Init, begin
from inference.isolation import RandomStream
from inference.loop import run_steps
from inference.objective import Model
from inference.posterior import Posterior
from inference.program import Program
from inference.start import NoStart
from inference.task import Task
from inference.watch import Callback, Watch, settled

__all__ = ["Attempt", "Fitting"]

_ASIDE = 2**20  # the number of the random stream of steps that are no part of the record
_CALLER = 5  # frames up from a warning to the line that called fit


@dataclass(frozen=True)
class Fitting:
    """What a fit is asked to do, its arguments checked.

    ``options`` are the task's, ``said`` what the record keeps of them; ``finds``
    says that steps are to be found, ``searches`` that a start is too, ``early``
    an end, and ``asked`` that the user said so.
    """

    model: Model
    guide: Model
    args: tuple[Any, ...]
    names: list[str]
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None
    options: dict[str, Any]
    steps: int
    seed: int
    engine: str
    init: Init
    finds: bool
    searches: bool
    asked: bool
    early: bool
    restarts: int
    callbacks: Sequence[Callback]
    progress: bool
    said: dict[str, Any]

    def best(self) -> tuple[Attempt, tuple[float, ...]]:
        """The best of all attempts, and the loss of each, infinite where one failed."""
        fits: list[Attempt | None] = []
        for number in range(self.restarts):
            try:
                fits.append(self._attempt(number))
            except ValueError as error:
                if self.restarts == 1:
                    raise
                self._warn(f"start {number + 1} of {self.restarts} failed: {error}")
                fits.append(None)
        whole = [fitted for fitted in fits if fitted is not None]
        if not whole:
            raise ValueError(f"all {self.restarts} starts failed; the warnings say at which step and site")
        losses = tuple(fitted.loss if fitted is not None else math.inf for fitted in fits)
        return min(whole, key=lambda fitted: fitted.loss), losses

    def _attempt(self, number: int) -> Attempt:
        stream = RandomStream.seeded(self.seed, number)
        program = Program.start(
            self.model, self.guide, self.args, stream, self.device, self.dtype, batch_size=self.batch_size
        )
        plain = Task.of(program, self.args, self.batch_size, **self.options)
        with tqdm(
            desc="start", bar_format="{desc} {elapsed}", disable=not (self.searches and self.progress), leave=False
        ):
            start = begin(program, self.args, stream, self.init, self.searches)
        if not self.finds:
            return self._run(number, plain, stream, start.evaluations)
        if not self.searches:
            start = NoStart("", start.evaluations)
        task, searched = automatic(plain, start, self.steps, self.early, self._taken)
        try:
            return self._run(number, task, stream, searched, unplaced(plain, start))
        except ValueError as error:
            if self.asked:
                raise
            self._warn(f"the steps that were found failed, so this is Adam: {error}")
            return self._run(number, plain, stream, searched)

    def _run(self, number: int, task: Task, stream: RandomStream, searched: int, without: str = "") -> Attempt:
        program, landing = task.program, task.landing
        runner, state = choose(self.engine, task, stream, self.steps * self.restarts, self.progress)
        used = "compiled" if isinstance(runner, CompiledEngine) else "eager"
        found = {"lr": "found", "optimizer": "auto"} if landing else {}
        options = {**self.said, **found, "engine": used}
        fitted = Attempt(program, self.args, state.flat, stream, self.names, self.seed, options, searched=searched)
        most = landing.steps if landing else self.steps
        watch = Watch(self.callbacks, most, program.params, fitted.posterior, (number + 1, self.restarts))
        label = f"fit {number + 1}/{self.restarts}" if self.restarts > 1 else "fit"
        fitted.curves = run_steps(runner, state, program, watch, label, self.progress)
        fitted.flat = runner.result(state)
        fitted.stop = self._judged(fitted, landing, without) if landing else None
        return fitted

    def _judged(self, fitted: Attempt, landing: Finding, without: str) -> Stop:
        """How the fit ended, why it began where the guide does, and what the guide's weights say of the place."""
        stop = landing.stop
        if without:
            stop = replace(stop, how=f"{stop.how}; it began where the guide does: {without}")
        if not stop.settled or stop.rhat is None:
            return stop
        return replace(stop, doubts=fitted.posterior(fitted.flat, fitted.curves, 0.0).doubts(seed=self.seed))

    def _taken(self, task: Task, count: int) -> Tensor:
        """θ after ``count`` steps that nobody watches."""
        stream = RandomStream.seeded(self.seed, _ASIDE)
        runner, state = choose(self.engine, task, stream, self.steps * self.restarts, self.progress)
        runner.advance(state, count)
        return runner.result(state).detach().clone()

    def _warn(self, words: str) -> None:
        warnings.warn(words, UserWarning, stacklevel=_CALLER)


@dataclass
class Attempt:
    """One start: where it is, and once it has ended its losses and KL, (2, steps)."""

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
        return Posterior(program, finished, self.args, self.names, record)


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
