"""Many fits at once: their steps in one compiled program, each with its own random numbers, losses and end.

A :class:`Lane` is one fit, and a :class:`_BatchedProgram` a slab of C lanes in
one program. Slabs run side by side on threads, as the compiled code holds no
lock of Python's. Each lane draws from its own random stream in the order in
which it would draw alone, so that a fit does not depend on its neighbours.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.engine.batched.stacked_step import BatchedStep, TracedFit
from inference.engine.compiled import replayed_traces, without_aliases
from inference.engine.compiler.cache import executable
from inference.engine.compiler.executable import Executable, ReplayedStep
from inference.engine.svi_problem import SVIProblem
from inference.engine.svi_step import RATES, step_rates
from inference.engine.tracing.random_ops import ReplayRandomOps
from inference.engine.tracing.traced_graph import GraphInput, InputKind, graph_inputs
from inference.model.elbo import loss
from inference.model.nonfinite_sites import failure
from inference.optim.optimizers import Update
from inference.utils.errors import NonFinite
from inference.utils.processes import interruptible
from inference.utils.random_state import RandomStream, environment

__all__ = ["CHUNK", "GLOBALS", "Lane", "batch_width", "run_batch"]

CHUNK = 100  # steps between two looks
GLOBALS = threading.Lock()  # around what uses the process-wide random numbers, defaults or parameters
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of two ways to compute a loss, relative


@dataclass
class Lane:
    """State of one fit inside a batched program.

    It takes ``steps``, fewer if its stopping rule says so. ``flat_params`` is θ, (P,), at
    its end, ``curves`` are its losses and KL, (2, steps taken). ``error``, or
    ``interrupted`` by a signal, is the reason of an early end. A lane that
    ``strayed`` found another first loss than its own model and guide do: the
    step that was traced for another fit is not its own.
    """

    problem: SVIProblem
    update: Update
    stream: RandomStream
    recording: TracedFit
    steps: int
    flat_params: Tensor = field(default_factory=lambda: torch.empty(0))
    error: NonFinite | None = None
    ended: bool = False
    interrupted: str | None = None
    strayed: bool = False
    _begun: dict[str, Any] = field(default_factory=dict)
    _losses: list[Tensor] = field(default_factory=list)
    _points: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begun = dict(self.stream.state)

    @property
    def curves(self) -> Tensor:
        """Losses and KL of all steps so far, (2, steps)."""
        if len(self._losses) > 1:
            self._losses = [torch.cat(self._losses)]
        return self._losses[0].T if self._losses else torch.empty(2, 0)

    @property
    def every(self) -> int | None:
        """Number of steps between two points of the path that its stopping rule looks at."""
        return None if self.problem.adaptive is None else self.problem.adaptive.every

    @property
    def rates_key(self) -> Hashable:
        """Key that fits share if their rates are the same at every step."""
        adaptive = self.problem.adaptive
        if adaptive is None:
            return id(self.update)
        return type(adaptive), adaptive.settling, adaptive.steps, getattr(adaptive, "size", None)

    def noise(self, steps: int, stream: RandomStream | None = None) -> list[Tensor]:
        """Return its next random numbers, from its own or from another stream.

        Torch's generator, Pyro's parameters and the default dtype belong to the process: one thread may use them.
        """
        bound_model = self.problem.bound_model
        with GLOBALS, (stream or self.stream).drawing(), environment(bound_model.device, bound_model.dtype):
            return self.recording.step.noise(steps)

    def check(self, first: Tensor, noise: list[Tensor]) -> None:
        """Compare the first loss, (2,), with the one that model and guide themselves compute from the same noise."""
        problem, bound_model = self.problem, self.problem.bound_model
        beta = problem.anneal(0) if problem.anneal else None
        own = []
        with GLOBALS, bound_model.running(problem.begin, RandomStream(dict(self.stream.state))), torch.no_grad():
            for values in self.recording.step.replayed(noise, 0):
                with ReplayRandomOps(values):
                    own.append(
                        loss(problem.model, problem.guide, problem.args, 1, True, beta, problem.sticking_the_landing)
                    )
        mean = torch.stack(own).mean(0).to(first.dtype)
        close = _CLOSE[mean.dtype] * (1 + mean.abs().nan_to_num().max())
        if mean.isfinite().all() and not torch.allclose(mean, first, rtol=0, atol=float(close)):
            self.strayed = self.ended = True
            self.stream.state = self._begun

    def take(self, losses: Tensor, step: int, state: list[Tensor]) -> None:
        """Count the losses and KL of the steps up to ``step``, (n, 2), after which θ and moments are ``state``."""
        self._losses.append(losses.clone())
        if self.every and step % self.every == 0:
            self._points.append(state[0].clone())
        if step % CHUNK and step != self.steps:
            return
        adaptive = self.problem.adaptive
        if adaptive is not None:
            with GLOBALS:
                adaptive.look(step, self._points, self.curves[0])
            self._points, self.steps = [], adaptive.steps
        if step >= self.steps:
            self.end(state)

    def lose(self, losses: Tensor) -> None:
        """Count the losses of the good steps before one that failed, (n, 2)."""
        self._losses.append(losses.clone())

    def end(self, state: list[Tensor], error: NonFinite | None = None) -> None:
        """Keep the result that θ and the moments give."""
        flat_params, *moments = state
        adaptive = self.problem.adaptive
        self.flat_params = (flat_params if adaptive is None else adaptive.result(flat_params, moments)).clone()
        self.error, self.ended = error, True


_NUMBERS = 2**14  # in the largest tensor of the fits of one slab, about, so that it stays in the fastest memory
_FEW, _MOST = 8, 32  # fits of a slab
_NOISE = 2**28  # bytes of random numbers of a slab


class _BatchedProgram:
    """A slab: C fits in one program. The first has the number ``first`` among all fits.

    All slabs use one program, so the last may have more places than fits. Empty places repeat the last fit, as a
    program of fewer places would have to be compiled; nobody reads what they compute.
    """

    def __init__(self, stacked: BatchedStep, lanes: Sequence[Lane], first: int, fits: int) -> None:
        self.stacked, self.fits, self.step = stacked, fits, 0
        self.lanes = list(lanes)
        self.bound_model = lanes[0].problem.bound_model
        self.block = lanes[0].recording.step.block
        self.noise: list[Tensor] = []
        begun = [[lane.problem.begin, *lane.update.init(lane.problem.begin)] for lane in self._filled(self.lanes)]
        values = {
            name: self._joined(parts) for name, parts in zip(stacked.state, zip(*begun, strict=True), strict=True)
        }
        places = self._filled(range(first, first + len(lanes)))
        values |= {name: self._joined([value[i] for i in places]) for name, value in stacked.own.items()}
        self._bind({**values, **stacked.shared})

    def _filled(self, values: Sequence[Any]) -> list[Any]:
        """Return one value for each place; empty places get the value of the last fit."""
        return [*values, *[values[-1]] * (self.fits - len(values))]

    def _joined(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Stack the tensors of the fits along the dimension in which the program has them."""
        if not self.stacked.last or self.bound_model.device.type != "cpu":
            return torch.stack(list(parts), -1 if self.stacked.last else dim)
        columns = np.ascontiguousarray(
            torch.stack(list(parts)).flatten(1).numpy().T
        )  # torch: up to eight times as long
        return torch.from_numpy(columns).view(*parts[0].shape, len(parts))

    def _bind(self, values: dict[GraphInput, Tensor]) -> None:
        """Compile the program, or find it in the cache, and bind it to memory.

        The example of the noise comes from a copy of a stream, so that binding does not use up random numbers. Inputs
        are separated from each other, as the program writes to the state and would change what shares its memory.
        """
        self._draw(RandomStream(dict(self.lanes[0].stream.state)))
        rows = {RATES: self._rates(0, 1)[0]}
        rows |= {GraphInput(InputKind.NOISE, i): part[0] for i, part in enumerate(self.noise)}
        self.noise = []
        names = graph_inputs(self.stacked.module.graph)
        self.row_inputs = [name for name in names if name.kind.is_row]
        inputs = without_aliases([{**values, **rows}[name] for name in names])
        self.state = [inputs[names.index(name)] for name in self.stacked.state]
        places = [names.index(name) for name in self.row_inputs]
        self.machine: Executable | ReplayedStep
        if self.bound_model.device.type == "cuda":
            self.machine = ReplayedStep(self.stacked.module, inputs, places, self.block)
        else:
            self.machine = executable(self.stacked.module, inputs, places, 1)

    @property
    def going(self) -> list[Lane]:
        """Fits that have not ended."""
        return [lane for lane in self.lanes if not lane.ended]

    def of(self, place: int, values: Sequence[Tensor]) -> list[Tensor]:
        """Return one fit's part of tensors that hold all of the slab."""
        return [value[..., place] if self.stacked.last else value[place] for value in values]

    def advance(self, until: int) -> int:
        """Take steps up to ``until``, as long as a fit goes on; return their number, counted for each fit.

        A chunk ends where a block of noise does, and at the next step at which some fit looks at its losses or ends.
        """
        taken = 0
        while self.step < until and self.going:
            if self.step % self.block == 0:
                self._draw()
            stops = [min(lane.steps, self.step + (lane.every or CHUNK)) for lane in self.going]
            stop = min(until, self.step + self.block - self.step % self.block, *stops)
            taken += (stop - self.step) * len(self.going)
            self._take(stop)
        self.noise = []  # used up, and large
        return taken

    def _take(self, stop: int) -> None:
        """Take steps up to ``stop``, after which each fit takes its losses.

        A fit that failed cannot be stopped in the middle of a program. So the chunk is taken, and if a loss or θ is
        not finite at its end, :meth:`_explain` takes it again step by step, for that fit.
        """
        before = [part.clone() for part in self.state]
        rows = self._rows(self.step, stop - self.step)
        found = self._run(rows)
        flat_params = self.state[0].isfinite().all(0 if self.stacked.last else 1)
        good = found[..., 0].isfinite().all(0) & flat_params
        if self.step == 0:
            for place, lane in enumerate(self.lanes):
                if lane.recording.borrowed:
                    lane.check(found[0, place], self._noise(place, rows, 0))
        bad = [i for i, lane in enumerate(self.lanes) if not (lane.ended or good[i])]
        if bad:
            self._explain(bad, before, rows, found)
        self.step = stop
        for place, lane in enumerate(self.lanes):
            if not lane.ended:
                lane.take(found[:, place], stop, self.of(place, self.state))

    def _run(self, rows: list[Tensor]) -> Tensor:
        """Return losses and KL of each step and fit, (n, C, 2)."""
        found = self.machine.run(rows)
        return found.transpose(1, 2) if self.stacked.last else found

    def _draw(self, example: RandomStream | None = None) -> None:
        """Draw random numbers for the next block, each fit's from its own stream in the order in which it draws alone.

        A fit that has ended draws no more: it gets the numbers of its neighbour, and nobody reads what they make.
        """
        parts: list[list[Tensor]] = []
        for lane in self.lanes:
            if parts and (lane.ended or example is not None):
                parts.append(parts[-1])
            else:
                parts.append(lane.noise(self.block, example))
        self.noise = [self._joined(numbers, 1) for numbers in zip(*self._filled(parts), strict=True)]

    def _rates(self, step: int, count: int) -> Tensor:
        """Return the rates of the next steps; they are computed once for fits that share a rule."""
        like = {lane.rates_key: lane for lane in self.lanes}
        found = [[step_rates(one.problem, one.update, i) for i in range(step, step + count)] for one in like.values()]
        places = [list(like).index(lane.rates_key) for lane in self._filled(self.lanes)]
        numbers = torch.tensor(found, dtype=self.bound_model.dtype, device=self.bound_model.device)[places]
        return (numbers.permute(1, 2, 0) if self.stacked.last else numbers.movedim(0, 1)).contiguous()

    def _rows(self, step: int, count: int) -> list[Tensor]:
        """Return the rows that the program reads in the next steps, which are of one block."""
        place = step % self.block
        named = {GraphInput(InputKind.NOISE, i): numbers[place : place + count] for i, numbers in enumerate(self.noise)}
        named[RATES] = self._rates(step, count)
        return [named[name] for name in self.row_inputs]

    def _noise(self, place: int, rows: list[Tensor], row: int) -> list[Tensor]:
        """Return the random numbers of one fit in one of these rows."""
        named = dict(zip(self.row_inputs, rows, strict=True))
        parts = [named[GraphInput(InputKind.NOISE, g)][row : row + 1] for g in range(len(self.noise))]
        return [part[..., place] if self.stacked.last else part[:, place] for part in parts]

    def _explain(self, bad: list[int], before: list[Tensor], rows: list[Tensor], found: Tensor) -> None:
        """Take the steps of the chunk again one by one, and end each of these fits at the step in which it failed.

        The state at the end is that of the first run, bit for bit, so the other fits notice nothing.
        """
        for part, value in zip(self.state, before, strict=True):
            part.copy_(value)
        for i in range(len(found)):
            last = {place: [part.clone() for part in self.of(place, self.state)] for place in bad}
            losses = self._run([row[i : i + 1] for row in rows])[0, :, 0]
            for place in list(bad):
                (after,) = self.of(place, self.state[:1])
                if losses[place].isfinite() and after.isfinite().all():
                    continue
                bad.remove(place)
                noise = self._noise(place, rows, i)
                self._fail(self.lanes[place], found[:i, place], self.step + i, last[place], after.clone(), noise)

    def _fail(
        self, lane: Lane, losses: Tensor, step: int, state: list[Tensor], after: Tensor, noise: list[Tensor]
    ) -> None:
        """End a fit that failed in ``step``, before which θ and moments were ``state``, and θ ``after`` it."""
        lane.lose(losses)
        problem, bound_model = lane.problem, lane.problem.bound_model
        with GLOBALS, bound_model.running(state[0].clone(), RandomStream(dict(lane.stream.state))):
            seen = replayed_traces(problem, lane.recording.step, noise, step)
            lane.end(state, failure(bound_model.params, state[0], after, seen, step))


def run_batch(stacked: BatchedStep, lanes: Sequence[Lane], fits: int, bar: tqdm[Any]) -> None:
    """Run all lanes to their ends, or to a signal, in slabs of ``fits``.

    Slabs run side by side on as many threads as torch has.
    """
    slabs = [_BatchedProgram(stacked, lanes[i : i + fits], i, fits) for i in range(0, len(lanes), fits)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            interruptible() as stop_signal,
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            going, step = slabs, 0
            while going and stop_signal.signal is None:
                step += CHUNK
                bar.update(sum(pool.map(lambda slab, until=step: slab.advance(until), going)))
                going = [slab for slab in going if slab.going]
        for slab in going:
            for place, lane in enumerate(slab.lanes):
                if not lane.ended:
                    lane.interrupted = stop_signal.signal
                    lane.end(slab.of(place, slab.state))
    finally:
        torch.set_num_threads(threads)


def batch_width(lanes: int, largest: int, noise: int, threads: int) -> int:
    """Return the number of fits, of ``lanes``, that run in one program.

    Few enough that their largest tensor stays in the fastest memory, and as many slabs as threads have use for.

    ``largest`` are the numbers in the largest tensor of one fit, ``noise`` the bytes of
    random numbers that it draws at once.
    """
    most = min(_MOST, max(_FEW, _NUMBERS // max(1, largest)), max(1, _NOISE // max(1, noise)))
    slabs = math.ceil(lanes / most)
    if lanes >= threads * _FEW:
        slabs = math.ceil(slabs / threads) * threads
    return math.ceil(lanes / slabs)
