"""The loop over chunks of steps, between which Python looks."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from inference.compiled import CompiledEngine
from inference.engines import Engine
from inference.pauses import Pauses
from inference.program import Program, set_training
from inference.watch import CHUNK, Watch

__all__ = ["run_steps"]

_CHUNK_SECONDS = 0.05


def run_steps(runner: Engine, state: Any, program: Program, watch: Watch, label: str, progress: bool) -> Tensor:
    """Take all steps in place, show a bar, call the callbacks; losses and KL, (2, steps).

    Chunks grow until one takes a twentieth of a second. They end where a
    callback is due, but for callbacks that only look while compiled steps run:
    those are told after the chunk what there was at their step.
    """
    compiled = isinstance(runner, CompiledEngine)
    size, late, landing = CHUNK, not watch.may_change and compiled, runner.task.landing
    every = landing.every if landing else None
    look = every if every and not compiled else CHUNK
    with tqdm(total=watch.steps, unit="step", disable=not progress, desc=label) as bar:
        while state.step < watch.steps:
            begun, pauses = time.perf_counter(), Pauses(partial(_until, watch, every))
            steps = min(size, (watch.steps if late else watch.until(state.step)) - state.step)
            steps = steps if landing is None else min(steps, look - state.step % look)
            try:
                chunk = runner.advance(state, steps, pauses)
            except ValueError:
                if not late:
                    raise
                late = False  # the same steps again, with the callbacks told of those before the one that fails
                continue
            if time.perf_counter() - begun < _CHUNK_SECONDS and len(chunk) == size:
                size *= 2
            if progress:
                bar.set_postfix(elbo=f"{-chunk[:, 0].mean().item():.4g}", refresh=False)
            bar.update(len(chunk))
            told = watch.tell(chunk, pauses)
            if landing is not None:
                landing.look(
                    state.step, [flat for at, _, flat in pauses.kept if every and at % every == 0], watch.curves[0]
                )
                bar.total = watch.steps = landing.steps
            if told and state.step < watch.steps:
                if not getattr(program.guide, "training", True):  # it was asked
                    set_training(program.guide, True)
                if watch.may_change:
                    runner.refresh(state)
    return watch.curves


def _until(watch: Watch, every: int | None, step: int) -> int:
    """The next step at which θ is wanted."""
    stop = watch.until(step)
    return stop if every is None else min(stop, step + every - step % every)
