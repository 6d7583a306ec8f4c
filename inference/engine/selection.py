"""The engines, and which of them a fit runs on."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from inference.engine.compiled import CompiledEngine
from inference.engine.compiler.inductor import NotCompilable
from inference.engine.eager import EagerEngine
from inference.engine.engine import Engine
from inference.engine.svi_problem import SVIProblem
from inference.engine.tracing.tracer import Untraceable
from inference.model.bound_model import name_of
from inference.utils.random_state import RandomStream
from inference.utils.warnings import warn

__all__ = ["choose", "worth_compiling"]

_ALWAYS_EAGER = 1_000  # runs of the model that cannot earn a compilation back, nor even the recording


def choose(name: str, problem: SVIProblem, stream: RandomStream, steps: int, progress: bool) -> tuple[Engine, Any]:
    """The engine to run, and its first state; ``name`` is ``"eager"``, ``"compiled"`` or ``"auto"``.

    ``steps`` are those of all the fits that one compilation would serve.

    Raises
    ------
    ValueError
        With the reason, if it is to be compiled and cannot be.
    """
    if name == "compiled" or (name == "auto" and steps * problem.particles >= _ALWAYS_EAGER):
        found, failed = _compiled(name, problem, stream, steps, progress)
        if problem.share is not None:  # all or none, and all wait for the slowest
            failed = problem.share.group.told(failed)
            found = None if problem.share.group.most(int(found is None))[0] else found
        if found is not None:
            return found
        if failed is not None and name == "compiled":
            raise ValueError(f"{failed}; engine='eager' runs it as it is")
        if failed is not None:
            warn(f"{failed}; it runs eagerly, pass engine='eager' to say so")
    eager = EagerEngine(problem)
    return eager, eager.init(stream)


def _compiled(
    name: str, problem: SVIProblem, stream: RandomStream, steps: int, progress: bool
) -> tuple[tuple[Engine, Any] | None, str | None]:
    """The compiled engine where it is worth it, and its first state; or why it cannot be."""
    try:
        compiled = CompiledEngine(problem, stream)
        if name == "auto" and not worth_compiling(compiled.operators, steps, compiled.step.batched or 1):
            return None, None
        with tqdm(desc="compile", bar_format="{desc} {elapsed}", disable=not progress, leave=False):
            return (compiled, compiled.init(stream)), None
    except (Untraceable, NotCompilable) as error:
        return None, f"the model {name_of(problem.bound_model.model)!r} cannot be compiled: {error}"


def worth_compiling(operators: int, steps: int, particles: int = 1) -> bool:
    """Whether compiled steps make up for the time that compiling takes.

    An eager step costs at least 5.5 µs of Python for each of its ``operators``,
    once for each of the ``particles`` that a compiled one takes together;
    compiling takes at most 5 s and 7 ms an operator. Both were measured on the
    machine of benchmarks/README.md. Nothing is timed here, nor looked up among
    the programs compiled before, so that the same call takes the same way every
    time.

    >>> worth_compiling(operators=450, steps=2_000), worth_compiling(operators=450, steps=10_000)
    (False, True)
    """
    return steps * particles * operators * 5.5e-6 > 5 + operators * 7e-3
