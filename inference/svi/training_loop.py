"""The loop over chunks of steps, between which Python looks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from inference.engine.engine import Engine, EngineState, IterateRecorder
from inference.model.bound_model import BoundModel, set_training
from inference.storage.checkpoint import Checkpoint
from inference.svi.callbacks.base import CHUNK, CallbackRunner
from inference.utils.errors import NonFinite
from inference.utils.signals import StopSignal, interruptible

__all__ = ["CheckpointWriter", "run_steps"]

_CHUNK_SECONDS, _MOST_SECONDS = 0.05, 1.0


class CheckpointWriter:
    """What is kept of a fit on its way: ``state()`` in a checkpoint, where there is one."""

    def __init__(self, checkpoint: Checkpoint | None, state: Callable[[], dict[str, Any]]) -> None:
        self._checkpoint, self._state = checkpoint, state

    def until(self, step: int) -> int | None:
        """The next step to keep, where steps are counted."""
        return None if self._checkpoint is None else self._checkpoint.until(step)

    def look(self, step: int) -> None:
        """Keep what there is, if it is time."""
        if self._checkpoint is not None and self._checkpoint.due(step):
            self.keep()

    def keep(self, failed: bool = False) -> None:
        """Keep what there is, and whether its next step fails."""
        if self._checkpoint is not None:
            self._checkpoint.write({**self._state(), "failed": failed})


def run_steps(
    runner: Engine,
    state: EngineState,
    bound_model: BoundModel,
    callback_runner: CallbackRunner,
    label: str,
    progress: bool,
    writer: CheckpointWriter,
) -> str | None:
    """Take all steps in place, show a bar, call the callbacks; the name of the signal that ended them before, if any.

    Chunks grow until one takes a twentieth of a second, and shrink where one
    takes more than a second. They end where a callback is due, but for callbacks
    that only look while compiled steps run: those are told after the chunk what
    there was at their step.

    Raises
    ------
    NonFinite
        At a loss or gradient that is not finite, with the state, and what the
        callbacks were told, after the last good step.
    """
    size, adaptive = CHUNK, runner.problem.adaptive
    with (
        tqdm(total=callback_runner.steps, initial=state.step, unit="step", disable=not progress, desc=label) as bar,
        interruptible() as stop_signal,
    ):
        while (
            steps := _agreed(runner, min(size, _room(runner, state, callback_runner, writer)), stop_signal)
        ) and not stop_signal.signal:
            begun, iterates = (
                time.perf_counter(),
                IterateRecorder(partial(_until, callback_runner, adaptive.every if adaptive else None)),
            )
            failure = None
            try:
                chunk = runner.advance(state, steps, iterates)
            except NonFinite as error:
                failure = error
                if error.step == state.step:
                    raise
                iterates.kept.clear()
                chunk = runner.advance(state, error.step - state.step, iterates)
            size = _next_size(size, len(chunk), time.perf_counter() - begun)
            if progress:
                bar.set_postfix(elbo=f"{-chunk[:, 0].mean().item():.4g}", refresh=False)
            bar.update(len(chunk))
            _tell(runner, state, bound_model, callback_runner, chunk, iterates)
            bar.total = callback_runner.steps
            if failure is not None:
                raise failure
            writer.look(state.step)
    return stop_signal.signal


def _agreed(runner: Engine, steps: int, stop_signal: StopSignal) -> int:
    """How many steps come next: where processes share them as many as the first one says, and one's end is all's."""
    if runner.problem.share is None:
        return steps
    group, heard = runner.problem.share.group, signal.Signals[stop_signal.signal].value if stop_signal.signal else 0
    steps, heard = group.most(steps if group.leads else 0, heard)
    stop_signal.signal = signal.Signals(heard).name if heard else None
    return steps


def _room(runner: Engine, state: EngineState, callback_runner: CallbackRunner, writer: CheckpointWriter) -> int:
    """The steps until something is to be done in between."""
    late, adaptive, step = runner.keeps_iterates, runner.problem.adaptive, state.step
    stops = [callback_runner.steps if late and not callback_runner.may_change else callback_runner.until(step)]
    if adaptive is not None:
        look = adaptive.every if adaptive.every and not late else CHUNK
        stops.append(step + look - step % look)
    if runner.problem.loader is not None:
        stops.append(step + runner.problem.loader.most)
    kept = writer.until(step)
    return min(stops if kept is None else [*stops, kept]) - step


def _next_size(size: int, taken: int, seconds: float) -> int:
    if seconds < _CHUNK_SECONDS and taken == size:
        return 2 * size
    return max(1, size // 2) if seconds > _MOST_SECONDS else size


def _tell(
    runner: Engine,
    state: EngineState,
    bound_model: BoundModel,
    callback_runner: CallbackRunner,
    chunk: Tensor,
    iterates: IterateRecorder,
) -> None:
    """Tell callbacks and the rule of the steps what there is."""
    told, adaptive = callback_runner.tell(chunk, iterates), runner.problem.adaptive
    if adaptive is not None:
        every = adaptive.every
        points = [flat_params for at, _, flat_params in iterates.kept if every and at % every == 0]
        adaptive.look(state.step, points, callback_runner.curves[0])
        callback_runner.steps = adaptive.steps
    if told and state.step < callback_runner.steps:
        if not getattr(bound_model.guide, "training", True):  # it was asked
            set_training(bound_model.guide, True)
        if callback_runner.may_change:
            runner.refresh(state)


def _until(callback_runner: CallbackRunner, every: int | None, step: int) -> int:
    """The next step at which θ is wanted."""
    stop = callback_runner.until(step)
    return stop if every is None else min(stop, step + every - step % every)
