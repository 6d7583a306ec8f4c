"""The compiled engine: model, guide, gradient and update as machine code, with Python only between chunks of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from inference.data.batch_loader import BatchLoader
from inference.data.generated_dataset import GeneratedBatches
from inference.engine.compiler.cache import executable
from inference.engine.compiler.executable import Executable, ReplayedStep
from inference.engine.compiler.inductor import NotCompilable
from inference.engine.engine import EngineState, IterateRecorder
from inference.engine.svi_problem import SVIProblem
from inference.engine.svi_step import RATES, SVIStep, batch_rows, state_inputs, step_rates, trace_step
from inference.engine.tracing.random_ops import ReplayRandomOps
from inference.engine.tracing.traced_graph import GraphInput, InputKind, graph_inputs, graph_text
from inference.engine.tracing.tracer import Untraceable
from inference.model.captured_values import changed, outside_values
from inference.model.elbo import traces
from inference.model.nonfinite_sites import failure, first_failure
from inference.optim.optimizers import Update, update_of
from inference.utils.errors import NonFinite
from inference.utils.random_state import RandomStream, environment

__all__ = [
    "CompiledEngine",
    "CompiledState",
    "NotCompilable",
    "Untraceable",
    "replayed_traces",
    "update_for",
    "without_aliases",
]

_WORTH_THREADS = 2**15  # numbers in a tensor from which a second thread gives more than its start costs


@dataclass
class CompiledState(EngineState):
    """State of the compiled engine: θ, the optimiser's moments, and the random numbers drawn for a block of steps.

    ``noise`` is that of the block of steps that ``step`` is in, empty where none was drawn;
    ``seed`` is what it comes from, where processes have noise of their own.
    """

    moments: list[Tensor]
    noise: list[Tensor] = field(default_factory=list)
    seed: int | None = None

    def copy(self) -> CompiledState:
        """Return a copy that the next steps do not change."""
        moments, stream = [moment.clone() for moment in self.moments], RandomStream(dict(self.stream.state))
        return replace(self, flat_params=self.flat_params.clone(), stream=stream, moments=moments)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers and tensors, by the names that checkpoints hold."""
        return {**super().state_dict(), "moments": list(self.moments), "noise": list(self.noise), "seed": self.seed}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set the state to the one that was saved, in place."""
        if [part.shape for part in saved["moments"]] != [moment.shape for moment in self.moments]:
            raise TypeError("the optimiser's moments are of other shapes")
        self.noise, self.seed = [part.to(self.flat_params.device) for part in saved["noise"]], saved.get("seed")
        super().load_state_dict(saved)
        for moment, before in zip(self.moments, saved["moments"], strict=True):
            moment.copy_(before)


class CompiledEngine:
    """``init``, then ``advance`` by any number of steps, as :class:`~inference.engine.eager.EagerEngine` does.

    The model's Python runs once, to be recorded; what it took from closures,
    globals and attributes is looked at again by :meth:`refresh`.

    Raises
    ------
    Untraceable
        With site or line and reason, if model, guide or optimiser cannot be recorded.
    """

    name = "compiled"
    keeps_iterates = True

    def __init__(self, problem: SVIProblem, stream: RandomStream) -> None:
        self.problem = problem
        self.bound_model = problem.bound_model
        self.update = update_for(problem)
        self.stream = stream
        self.own = problem.share is not None and problem.share.own
        if problem.share is not None and self.bound_model.device.type != "cpu":
            raise Untraceable("several processes on GPUs exchange their gradients between the steps of Python alone")
        self._trace()

    def _trace(self) -> None:
        before = self._outside()
        self.step = self._recorded()
        self.outside = self._outside()
        names = changed(before, self.outside)
        if names and graph_text(self._recorded().module.graph) != graph_text(self.step.module.graph):
            raise Untraceable(f"it changes {names} while it runs and computes with it, which a graph cannot")

    def _outside(self) -> dict[str, object]:
        data = self.problem.data
        draw = data.draw if isinstance(data, GeneratedBatches) else None
        args = () if isinstance(data, BatchLoader) else data.first
        return outside_values((self.problem.model, self.problem.guide, args, draw))

    def _recorded(self) -> SVIStep:
        return trace_step(self.problem, self.update, self.stream)

    @property
    def operators(self) -> int:
        """How many operators one step has."""
        return sum(node.op == "call_function" for node in self.step.module.graph.nodes)

    @property
    def block(self) -> int:
        """Steps whose noise is drawn together."""
        return 1 if self.own and None in self.step.randoms else self.step.block

    def init(self, stream: RandomStream) -> CompiledState:
        """The state before the first step; compiles, or finds what was compiled before.

        Raises
        ------
        NotCompilable
            If there is no compiler, or it refuses the program.
        """
        flat_params = self.problem.begin
        state = CompiledState(flat_params, stream, self.update.init(flat_params))
        self._bind(state)
        return state

    def result(self, state: CompiledState) -> Tensor:
        """θ that the steps so far have found: their last, or an average."""
        return (
            state.flat_params
            if self.problem.adaptive is None
            else self.problem.adaptive.result(state.flat_params, state.moments)
        )

    def refresh(self, state: CompiledState) -> None:
        """Record and compile again if something that the model takes from around it has changed."""
        names = changed(self.outside, self._outside())
        if self.problem.share is not None:
            self.problem.share.refuse(names)
        if names:
            self._trace()
            state.noise = []
            self._bind(state)

    def advance(self, state: CompiledState, steps: int, iterates: IterateRecorder | None = None) -> Tensor:
        """Take steps as :meth:`inference.engine.engine.Engine.advance` says; ``iterates`` has all that it wants."""
        if self.problem.loader is not None:
            self.problem.loader.hold(state.step, steps)
        start = state.copy()
        with self._drawing(state.stream):
            found = torch.cat(self._take(state, steps, iterates))
        if not (torch.isfinite(found[:, 0]).all() and torch.isfinite(state.flat_params).all()):
            self._explain(state, start, found[:, 0])
        return found

    def state_dict(self, state: CompiledState) -> dict[str, Any]:
        """Return all that changes, as numbers and tensors; of the noise only what the next steps use."""
        uses_noise = state.step % self.block and not self.own
        return (state if uses_noise else replace(state, noise=[])).state_dict()

    def load_state_dict(self, state: CompiledState, saved: Mapping[str, Any]) -> None:
        """Set a state to the one that was saved, in place."""
        state.load_state_dict({**saved, "noise": []} if self.own else saved)

    def _take(self, state: CompiledState, steps: int, iterates: IterateRecorder | None = None) -> list[Tensor]:
        """Steps as they come, good or bad: their losses, in pieces."""
        losses, last = [], state.step + steps
        with self.problem.together():
            while state.step < last:
                stop = last if iterates is None else min(last, iterates.until(state.step))
                rows, values = self._run(state, stop - state.step)
                losses.append(values)
                state.step += len(rows[0])
                if iterates is not None and state.step == stop:
                    iterates.keep(stop, state.flat_params)
        return losses

    def _run(self, state: CompiledState, most: int) -> tuple[list[Tensor], Tensor]:
        """Take the next steps, up to the end of their block: what the machine was given, and their losses."""
        with self._noise_of(state):
            place = state.step % self.block
            if place == 0 or not state.noise:
                state.noise = self.step.noise(self.block)
            count = min(most, self.block - place)
            rows = self._rows(state.step, [noise[place : place + count] for noise in state.noise], count)
            return rows, self.machine.run(rows)

    def _noise_of(self, state: CompiledState) -> AbstractContextManager[None]:
        """Where processes have noise of their own, that of the block that ``state`` is in."""
        share = self.problem.share
        if share is None or not self.own:
            return nullcontext()
        if state.step % self.block == 0 or state.seed is None:
            state.seed = share.seed()
        return share.noise(state.seed)

    def _bind(self, state: CompiledState) -> None:
        values = dict(zip(state_inputs(self.update), [state.flat_params, *state.moments], strict=True))
        values[RATES] = self._rates(0, 1)[0]
        values |= batch_rows(self.problem.batch_tensors)
        with self._drawing(RandomStream(dict(state.stream.state))):
            values |= {GraphInput(InputKind.NOISE, i): noise[0] for i, noise in enumerate(self.step.noise(1))}
        constants = enumerate(without_aliases(self.step.constants))
        values |= {GraphInput(InputKind.CONSTANT, i): value for i, value in constants}
        names = graph_inputs(self.step.module.graph)
        self.row_inputs = [name for name in names if name.kind.is_row]
        inputs = [values[name] for name in names]
        rows = [names.index(name) for name in self.row_inputs]
        self.machine: Executable | ReplayedStep
        if self.bound_model.device.type == "cuda":
            self.machine = ReplayedStep(self.step.module, inputs, rows, self.block)
        else:
            threads = torch.get_num_threads() if self.step.largest >= _WORTH_THREADS else 1
            self.machine = executable(self.step.module, inputs, rows, threads)

    @contextmanager
    def _drawing(self, stream: RandomStream) -> Iterator[None]:
        with stream.drawing(), environment(self.bound_model.device, self.bound_model.dtype):
            yield

    def _rates(self, step: int, count: int) -> Tensor:
        rates = [step_rates(self.problem, self.update, i) for i in range(step, step + count)]
        return torch.tensor(rates, dtype=self.bound_model.dtype, device=self.bound_model.device)

    def _rows(self, step: int, noise: Sequence[Tensor], count: int) -> list[Tensor]:
        named = {GraphInput(InputKind.NOISE, i): numbers for i, numbers in enumerate(noise)}
        named[RATES] = self._rates(step, count)
        if self.problem.loader is not None:
            named |= batch_rows(self.problem.loader.rows(step, count))
        return [named[name] for name in self.row_inputs]

    def _explain(self, state: CompiledState, start: CompiledState, losses: Tensor) -> None:
        """Put the state back to ``start``, and raise what happened in the first bad of the steps with these losses."""
        good = first_failure(losses, lambda count: self._good_after(state, start, count))
        self._good_after(state, start, good)
        flat_params, number = state.flat_params.clone(), state.step
        with self._drawing(state.stream), self.problem.together():
            rows, _ = self._run(state, 1)
        after, stream = state.flat_params.clone(), RandomStream(dict(state.stream.state))
        _put_back(state, start)
        named = dict(zip(self.row_inputs, rows, strict=True))
        noise = [named[GraphInput(InputKind.NOISE, i)] for i in range(len(self.step.groups))]
        with self.bound_model.running(flat_params, stream):
            pairs = replayed_traces(self.problem, self.step, noise, number)  # of the model itself
            find = partial(failure, self.bound_model.params, flat_params, after, pairs, number)
            raise find() if self.problem.share is None else self.problem.share.agreed(find)

    def _good_after(self, state: CompiledState, start: CompiledState, steps: int) -> bool:
        """Take ``steps`` steps from ``start``, and say whether θ is finite."""
        _put_back(state, start)
        with self._drawing(state.stream):
            self._take(state, steps)
        return bool(torch.isfinite(state.flat_params).all())


def replayed_traces(
    problem: SVIProblem, recorded: SVIStep, noise: Sequence[Tensor], step: int
) -> Iterator[tuple[poutine.Trace, poutine.Trace]]:
    """The traces of the model itself on the first row of ``noise``, one for each particle."""
    for values in recorded.replayed(noise, 0):
        try:
            with ReplayRandomOps(values):
                pair = traces(problem.model, problem.guide, problem.args_at(step))
        except Exception as error:
            raise NonFinite(f"the model could not run at step {step}: {error}", step) from error
        yield pair


def update_for(problem: SVIProblem) -> Update:
    """The update of a task, or :class:`Untraceable` where its optimiser has no compiled form."""
    update = problem.adaptive or update_of(problem.optimizer, problem.lr)
    if update is None:
        name = getattr(problem.optimizer, "__name__", problem.optimizer)
        raise Untraceable(f"the optimiser {name} with these options has no compiled form")
    return update


def without_aliases(values: Sequence[Tensor]) -> list[Tensor]:
    """The values, each in memory of its own."""
    seen: set[int] = set()
    without_aliases = []
    for value in values:
        memory = value.untyped_storage().data_ptr()
        without_aliases.append(value.clone() if memory in seen else value)
        seen.add(memory)
    return without_aliases


def _put_back(state: CompiledState, saved: CompiledState) -> None:
    state.flat_params.copy_(saved.flat_params)
    for moment, before in zip(state.moments, saved.moments, strict=True):
        moment.copy_(before)
    state.stream.state = dict(saved.stream.state)
    state.step, state.noise, state.seed = saved.step, saved.noise, saved.seed
