"""The loop over chunks of steps, between which Python looks."""

from __future__ import annotations

import time
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
    size, late = CHUNK, not watch.may_change and isinstance(runner, CompiledEngine)
    with tqdm(total=watch.steps, unit="step", disable=not progress, desc=label) as bar:
        while state.step < watch.steps:
            begun, pauses = time.perf_counter(), Pauses(watch.until)
            steps = min(size, (watch.steps if late else watch.until(state.step)) - state.step)
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
            if watch.tell(chunk, pauses) and state.step < watch.steps:
                if not getattr(program.guide, "training", True):  # it was asked
                    set_training(program.guide, True)
                if watch.may_change:
                    runner.refresh(state)
    return watch.curves
