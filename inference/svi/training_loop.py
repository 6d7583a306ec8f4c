"""The loop over chunks of steps, between which Python looks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from inference.engine.compiled import CompiledEngine
from inference.engine.iterates import Pauses
from inference.engine.selection import Engine
from inference.model.bound_model import Program, set_training
from inference.storage.checkpoint import Checkpoint
from inference.svi.callbacks.base import CHUNK, Watch
from inference.utils.errors import NonFinite
from inference.utils.signals import Wish, interruptible

__all__ = ["Keeper", "run_steps"]

_CHUNK_SECONDS, _MOST_SECONDS = 0.05, 1.0


class Keeper:
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
    runner: Engine, state: Any, program: Program, watch: Watch, label: str, progress: bool, keeper: Keeper
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
    size, landing = CHUNK, runner.task.landing
    with (
        tqdm(total=watch.steps, initial=state.step, unit="step", disable=not progress, desc=label) as bar,
        interruptible() as wish,
    ):
        while (steps := _agreed(runner, min(size, _room(runner, state, watch, keeper)), wish)) and not wish.signal:
            begun, pauses = time.perf_counter(), Pauses(partial(_until, watch, landing.every if landing else None))
            failure = None
            try:
                chunk = runner.advance(state, steps, pauses)
            except NonFinite as error:
                failure = error
                if error.step == state.step:
                    raise
                pauses.kept.clear()
                chunk = runner.advance(state, error.step - state.step, pauses)
            size = _next_size(size, len(chunk), time.perf_counter() - begun)
            if progress:
                bar.set_postfix(elbo=f"{-chunk[:, 0].mean().item():.4g}", refresh=False)
            bar.update(len(chunk))
            _tell(runner, state, program, watch, chunk, pauses)
            bar.total = watch.steps
            if failure is not None:
                raise failure
            keeper.look(state.step)
    return wish.signal


def _agreed(runner: Engine, steps: int, wish: Wish) -> int:
    """How many steps come next: where processes share them as many as the first one says, and one's end is all's."""
    if runner.task.share is None:
        return steps
    group, heard = runner.task.share.group, signal.Signals[wish.signal].value if wish.signal else 0
    steps, heard = group.most(steps if group.leads else 0, heard)
    wish.signal = signal.Signals(heard).name if heard else None
    return steps


def _room(runner: Engine, state: Any, watch: Watch, keeper: Keeper) -> int:
    """The steps until something is to be done in between."""
    compiled, landing, step = isinstance(runner, CompiledEngine), runner.task.landing, state.step
    stops = [watch.steps if compiled and not watch.may_change else watch.until(step)]
    if landing is not None:
        look = landing.every if landing.every and not compiled else CHUNK
        stops.append(step + look - step % look)
    if runner.task.batches is not None:
        stops.append(step + runner.task.batches.most)
    kept = keeper.until(step)
    return min(stops if kept is None else [*stops, kept]) - step


def _next_size(size: int, taken: int, seconds: float) -> int:
    if seconds < _CHUNK_SECONDS and taken == size:
        return 2 * size
    return max(1, size // 2) if seconds > _MOST_SECONDS else size


def _tell(runner: Engine, state: Any, program: Program, watch: Watch, chunk: Tensor, pauses: Pauses) -> None:
    """Tell callbacks and the rule of the steps what there is."""
    told, landing = watch.tell(chunk, pauses), runner.task.landing
    if landing is not None:
        every = landing.every
        points = [flat for at, _, flat in pauses.kept if every and at % every == 0]
        landing.look(state.step, points, watch.curves[0])
        watch.steps = landing.steps
    if told and state.step < watch.steps:
        if not getattr(program.guide, "training", True):  # it was asked
            set_training(program.guide, True)
        if watch.may_change:
            runner.refresh(state)


def _until(watch: Watch, every: int | None, step: int) -> int:
    """The next step at which θ is wanted."""
    stop = watch.until(step)
    return stop if every is None else min(stop, step + every - step % every)
