"""Starts of fits that are ready to take their steps, grouped by the form of their step.

Fits can share a program if their traced steps are the same operators on the same
shapes (``TracedFit.form``), and if their optimisers compute the same update.
What else differs, from data to step sizes and random numbers, becomes an input.
A fit that cannot be traced, or whose group cannot be compiled, is left as it
is: its own engine then runs it, so that grouping decides on speed alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tqdm.auto import tqdm

from inference.engine.batched.runner import Lane, batch_width, run_batch
from inference.engine.batched.stacked_step import stack
from inference.engine.batched.trace_cache import TraceCache
from inference.engine.compiled import update_for
from inference.engine.compiler.inductor import NotCompilable
from inference.engine.selection import worth_compiling
from inference.engine.svi_problem import StepPlan, SVIProblem
from inference.engine.svi_step import RATES, state_inputs, step_rates
from inference.engine.tracing.traced_graph import GraphInput, InputKind
from inference.engine.tracing.tracer import Untraceable
from inference.optim.optimizers import Update
from inference.utils.random_state import RandomStream
from inference.utils.warnings import warn

__all__ = ["FitBatch", "PreparedRestart", "bar_over", "grouped", "run_joined"]


@dataclass
class PreparedRestart:
    """One start of a fit, about to take its ``steps``; once it has run with others, in ``lane``.

    ``plain`` is its task, ``plan`` how it finds its way, ``num_evaluations`` what that has
    cost in gradients, ``trace_key`` what it shares with fits of the same model and guide, and ``fit_number``
    the place of its fit among others.
    """

    number: int
    trace_key: Hashable
    plain: SVIProblem
    plan: StepPlan | None
    stream: RandomStream
    steps: int
    num_evaluations: int
    lane: Lane | None = None
    fit_number: int = 0

    @cached_property
    def problem(self) -> SVIProblem:
        """The problem that the engine is to solve."""
        return self.plain if self.plan is None else self.plan.problem(self.plain)


@dataclass
class FitBatch:
    """Starts whose steps are of one form, each with its lane."""

    ready: list[PreparedRestart]
    lanes: list[Lane]

    @property
    def steps(self) -> int:
        """Number of steps of all starts together, at most."""
        return sum(lane.steps for lane in self.lanes)

    def worth(self, engine: str) -> bool:
        """Return True if compiling the step pays off over the steps of all starts."""
        step = self.lanes[0].recording.step
        operators = sum(node.op == "call_function" for node in step.module.graph.nodes)
        return engine == "compiled" or worth_compiling(operators, self.steps, step.batched or 1)

    def unlike(self, other: FitBatch) -> str:
        """Describe how the step of these fits differs from that of others."""
        mine, theirs = self.lanes[0], other.lanes[0]
        if len(mine.problem.begin) != len(theirs.problem.begin):
            return f"one has {len(theirs.problem.begin):,} parameters and another {len(mine.problem.begin):,}"
        shapes = [[tuple(c.shape) for c in lane.recording.constants] for lane in (theirs, mine)]
        found = [pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]]
        if found:
            return f"one has a constant of shape {found[0][0]} where another has {found[0][1]}"
        return "they run other operators"

    def run(self, bar: tqdm[Any]) -> None:
        """Take all steps of all starts.

        A lane strays if its first loss is not the one of its own model and guide: a trace that was borrowed from
        another fit was not its own. Its steps do not count then, and it runs alone.

        Raises
        ------
        Untraceable, NotCompilable
            If they cannot run together, with the reason.
        """
        lane, threads = self.lanes[0], torch.get_num_threads()
        step = lane.recording.step
        fits = batch_width(len(self.lanes), step.largest, step.noise_bytes * step.block, threads)
        state = state_inputs(lane.update)
        inputs = dict(zip(state, [lane.problem.begin, *lane.update.init(lane.problem.begin)], strict=True))
        inputs[RATES] = lane.problem.begin.new_tensor(step_rates(lane.problem, lane.update, 0))
        noise = lane.noise(1, RandomStream(dict(lane.stream.state)))
        inputs |= {GraphInput(InputKind.NOISE, i): part[0] for i, part in enumerate(noise)}
        stacked = stack([one.recording for one in self.lanes], inputs, state, fits)
        run_batch(stacked, self.lanes, fits, bar)
        for ready, one in zip(self.ready, self.lanes, strict=True):
            ready.lane = None if one.strayed else one
        strayed = sum(one.strayed for one in self.lanes)
        if strayed:
            warn(f"{strayed} fits run one by one: their guide keeps something of its data beside its parameters")


def grouped(starts: Sequence[PreparedRestart], progress: bool) -> tuple[list[FitBatch], dict[str, int]]:
    """Return the starts by the form of their steps; and the reasons why others have none, with their counts."""
    recorder, groups = TraceCache(), dict[Hashable, FitBatch]()
    reasons = Counter[str]()
    updates: dict[Hashable, Update] = {}
    for ready in tqdm(starts, desc="record", unit="fit", disable=not progress, leave=False):
        problem = ready.problem
        try:
            # An adaptive optimiser has a state of its own for each fit, so its update is not shared either. Others
            # share one update, by which the runner sees that their rates are the same at every step.
            kind = ready if problem.adaptive is not None else (_identity(problem.optimizer), _identity(problem.lr))
            update = updates.setdefault(id(ready) if kind is ready else kind, update_for(problem))
            recording = recorder.record(problem, update, ready.stream, ready.trace_key)
        except Untraceable as error:
            reasons[str(error)] += 1
            continue
        form = (
            recording.form,
            type(update),
            problem.bound_model.params.size,
            problem.bound_model.dtype,
            problem.bound_model.device,
        )
        group = groups.setdefault(form, FitBatch([], []))
        group.ready.append(ready)
        steps = ready.steps if problem.adaptive is None else problem.adaptive.steps
        group.lanes.append(Lane(problem, update, ready.stream, recording, steps))
    return list(groups.values()), dict(reasons)


def run_joined(starts: Sequence[PreparedRestart | ValueError], engine: str, progress: bool) -> None:
    """Run starts together if they can be, and leave the others as they are."""
    able = [ready for ready in starts if isinstance(ready, PreparedRestart)]
    groups, _ = grouped(able, progress)
    for group in groups:
        if len(group.lanes) > 1 and group.worth(engine):
            with bar_over([group], progress) as bar, suppress(Untraceable, NotCompilable):
                group.run(bar)


def bar_over(groups: Sequence[FitBatch], progress: bool) -> tqdm[Any]:
    """Return a progress bar over the steps of all of these fits."""
    fits = sum(len(group.lanes) for group in groups)
    steps = sum(group.steps for group in groups)
    return tqdm(total=steps, desc=f"{fits} fits", unit="step", unit_scale=True, disable=not progress)


def _identity(value: Any) -> Hashable:
    return value if isinstance(value, str | float | int) else id(value)
