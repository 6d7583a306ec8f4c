"""Options of a fit, and the problem that it solves: each checked once, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, auto
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from inference.data.arguments import argument_names, as_tensors
from inference.data.batch_loader import BatchLoader
from inference.data.batched_dataset import BatchedDataset, batches, on_disk
from inference.data.generated_dataset import GeneratedBatches, GeneratedDataset
from inference.engine.process_group import ProcessGroup, spoken
from inference.engine.svi_problem import DataSource, InMemory
from inference.model.bound_model import device_for
from inference.model.elbo import Model
from inference.optim.initialization.strategies import InitStrategy, as_init_strategy
from inference.optim.optimizers import optimizer_class
from inference.optim.schedules import LearningRate, TemperingSchedule, as_schedule, as_tempering_schedule
from inference.storage.checkpoint import Checkpoint
from inference.storage.fit_fingerprint import Fingerprint, describe_differences, fingerprint_of, fingerprint_of_data
from inference.svi.callbacks.base import Callback, as_callbacks
from inference.utils.validation import as_dtype, flag, one_of, positive_integer, positive_number, seed_number

__all__ = ["FitOptions", "FitProblem", "StepRule", "fingerprint_of_fit", "require_same_fit"]

_USUAL_LR = 0.01
_LONG = 1_000  # steps from which a fit is worth the search of its start


class StepRule(Enum):
    """How the steps of a fit are chosen: by the given optimiser, or by a search, which the user may have requested."""

    FIXED = auto()
    SEARCHED = auto()
    SEARCHED_ON_REQUEST = auto()


def _checked(check: Callable[[Any], Any], help_text: str) -> dict[str, Any]:
    """Return the metadata of an option: the function that checks and normalises its value, and one line of help."""
    return {"check": check, "help": help_text}


def _if_given(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _unless_callable(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value if callable(value) else check(value)


def _optimizer(value: Any) -> Any:
    if value != "auto":
        optimizer_class(value)
    return value


def _checkpoint(value: Any) -> Any:
    if not isinstance(value, str | Path | Checkpoint):
        raise TypeError(f"checkpoint is {value!r}: pass a folder, or Checkpoint(folder, every=…)")
    return value


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of :func:`~inference.fit`, checked when they are made.

    They are described in the docstring of :func:`~inference.fit`. The metadata of
    each field holds ``check``, which returns the value in its usual type or raises,
    and ``help``, one line for the command line.

    Raises
    ------
    TypeError, ValueError
        If an option is invalid, or two of them exclude each other; the message names them.
    """

    steps: int = field(
        default=10_000, metadata=_checked(partial(positive_integer, name="steps"), "Number of optimiser steps.")
    )
    lr: LearningRate | None = field(
        default=None,
        metadata=_checked(
            _if_given(_unless_callable(partial(positive_number, name="lr"))), "Step size, or a function of the step."
        ),
    )
    optimizer: str | Callable[..., Optimizer] | None = field(
        default=None,
        metadata=_checked(
            _if_given(_optimizer),
            "adam, adamw, clippedadam or sgd; auto finds the start, the step size and the end, as is done if left out.",
        ),
    )
    init: InitStrategy = field(
        default="auto",
        metadata=_checked(as_init_strategy, "Initial values of the guide: auto, mode, prior, or {site: value}."),
    )
    stop: str = field(
        default="auto",
        metadata=_checked(
            partial(one_of, name="stop", choices=("auto", "converged", "steps")),
            "When the fit ends: auto, converged, or steps for all of them.",
        ),
    )
    particles: int = field(
        default=1, metadata=_checked(partial(positive_integer, name="particles"), "Number of draws per step.")
    )
    batch_size: int | None = field(
        default=None,
        metadata=_checked(
            _if_given(partial(positive_integer, name="batch_size")), "Number of rows per step; all if left out."
        ),
    )
    seed: int = field(default=0, metadata=_checked(seed_number, "Seed of all random numbers."))
    device: str | torch.device = field(
        default="auto", metadata=_checked(lambda value: value, "auto, cpu, cuda or cuda:N.")
    )
    dtype: torch.dtype | str | None = field(
        default=None, metadata=_checked(_if_given(as_dtype), "float32 or float64; torch's default if left out.")
    )
    engine: str = field(
        default="auto",
        metadata=_checked(
            partial(one_of, name="engine", choices=("auto", "eager", "compiled")), "auto, eager or compiled."
        ),
    )
    anneal: int | TemperingSchedule | None = field(
        default=None,
        metadata=_checked(
            _if_given(_unless_callable(partial(positive_integer, name="anneal"))),
            "Number of steps over which the target rises to its full height.",
        ),
    )
    restarts: int = field(
        default=1,
        metadata=_checked(
            partial(positive_integer, name="restarts"),
            "Number of restarts, of which the one with the best ELBO is kept.",
        ),
    )
    checkpoint: str | Path | Checkpoint | None = field(
        default=None, metadata=_checked(_if_given(_checkpoint), "Folder in which the state of the fit is kept.")
    )
    resume: bool = field(
        default=False,
        metadata=_checked(
            partial(flag, name="resume"),
            "Resume a fit that was interrupted or killed; the numbers are the same as without the interruption.",
        ),
    )
    progress: bool = field(default=True, metadata=_checked(partial(flag, name="progress"), "Show a progress bar."))
    callbacks: Sequence[Callback] = field(
        default=(), metadata=_checked(as_callbacks, "Functions that are called with a Progress during the fit.")
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, option.metadata["check"](getattr(self, option.name)))
        if self.optimizer == "auto" and (self.lr is not None or self.anneal is not None):
            raise ValueError("optimizer='auto' finds its own steps: leave lr and anneal out")
        if self.stop == "converged" and self.step_rule is StepRule.FIXED:
            raise ValueError("stop='converged' goes with steps that are found: pass optimizer='auto', and leave lr out")
        if callable(self.lr):
            as_schedule(self.lr, self.steps)
        _ = self.tempering  # raises if the schedule does not fit the steps
        if self.resume and self.checkpoint is None:
            raise ValueError("resume=True needs the folder of the fit: pass checkpoint=")

    @classmethod
    def help_of(cls, name: str) -> str:
        """Return one line of help for the option ``name``."""
        return str(cls.__dataclass_fields__[name].metadata["help"])

    @property
    def step_rule(self) -> StepRule:
        """How the steps are chosen."""
        if self.optimizer == "auto":
            return StepRule.SEARCHED_ON_REQUEST
        fixed = self.optimizer is not None or self.lr is not None or self.anneal is not None or self.steps < _LONG
        return StepRule.FIXED if fixed else StepRule.SEARCHED

    @property
    def stop_early(self) -> bool:
        """Whether a searched step rule may end the fit before ``steps``."""
        return self.stop != "steps"

    @property
    def base_optimizer(self) -> str | Callable[..., Optimizer]:
        """Optimiser of the steps that are not searched."""
        return "adam" if self.optimizer is None or self.optimizer == "auto" else self.optimizer

    @property
    def step_size(self) -> LearningRate:
        """Learning rate of the steps that are not searched."""
        return _USUAL_LR if self.lr is None else self.lr

    @cached_property
    def tempering(self) -> TemperingSchedule | None:
        """β by step, the power that the target is raised to; None for 1."""
        return as_tempering_schedule(self.anneal, self.steps)

    @cached_property
    def checkpoint_folder(self) -> Checkpoint | None:
        """The checkpoint, made from a path where one was given."""
        return Checkpoint(self.checkpoint) if isinstance(self.checkpoint, str | Path) else self.checkpoint

    def report(self) -> dict[str, Any]:
        """Return the options that the record of the fit keeps, as numbers and texts."""
        lr = self.step_size
        return {
            "steps": self.steps,
            "lr": f"{_name(lr)} from {lr(0):g}" if callable(lr) else lr,
            "optimizer": _name("adam" if self.optimizer is None else self.optimizer),
            "particles": self.particles,
            "batch_size": self.batch_size,
            "anneal": _name(self.anneal),
            "init": self.init if isinstance(self.init, str) else sorted(self.init),
        }


@dataclass(frozen=True)
class FitProblem:
    """A model, a guide and the data to fit them to, on one device and in one float type."""

    model: Model
    guide: Model
    data: DataSource
    argument_names: list[str]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Model, guide: Model, data: tuple[Any, ...], options: FitOptions) -> FitProblem:
        """Convert the arguments of the model to tensors, and open what is read or drawn at each step.

        Raises
        ------
        ValueError
            If the device, an argument of the model or a column of the data is invalid; the message names it.
        """
        device, dtype = device_for(options.device, model, guide), as_dtype(options.dtype)
        batch_size, seed = options.batch_size, options.seed
        if batch_size is not None and on_disk(data):
            data = (batches(*data),)
        if not any(isinstance(value, GeneratedDataset | BatchedDataset) for value in data):
            names = argument_names(model, len(data))
            source: DataSource = InMemory(as_tensors(data, names, device, dtype), batch_size)
            return cls(model, guide, source, names, device, dtype)
        if len(data) > 1:
            kind = "fresh data stand" if any(isinstance(value, GeneratedDataset) for value in data) else "batches stand"
            raise ValueError(f"{kind} alone, found {len(data)} arguments: let them give all of them")
        names = argument_names(model, 100)
        if isinstance(data[0], GeneratedDataset):
            if batch_size is not None:
                raise ValueError("batch_size is for data given as arrays: let the function draw fewer rows")
            source = GeneratedBatches(data[0], names, device, dtype, seed)
        else:
            source = BatchLoader(data[0], names, device, dtype, batch_size, seed)
        return cls(model, guide, source, names[: len(source.first)], device, dtype)

    @property
    def args(self) -> tuple[Any, ...]:
        """Arguments of the model: all of the data, or those of the first step."""
        return self.data.first

    @property
    def is_in_memory(self) -> bool:
        """Whether each step uses all rows, which lie in memory."""
        return isinstance(self.data, InMemory) and self.data.batch_size is None

    def report(self) -> dict[str, Any]:
        """Return what the record of the fit keeps of the data."""
        if isinstance(self.data, BatchLoader):
            return {"batch_size": self.data.batch_size, "num_data": self.data.num_data}
        return {}


def fingerprint_of_fit(problem: FitProblem, options: FitOptions) -> Fingerprint:
    """Return what a fit has to share with one that it resumes, by the names that checkpoints hold."""
    report = {**options.report(), **problem.report()}
    values: dict[str, Any] = {"optimizer": options.base_optimizer, "lr": options.step_size, "anneal": options.tempering}
    values["init"] = dict(options.init) if isinstance(options.init, Mapping) else options.init
    schedules = {name: value for name, value in values.items() if name != "optimizer" and callable(value)}
    found = {**fingerprint_of(problem.model, "model"), **fingerprint_of(problem.guide, "guide")}
    if isinstance(problem.data, GeneratedBatches):
        found |= fingerprint_of(problem.data.draw, "fresh data")
    else:
        found |= fingerprint_of_data(problem.argument_names, problem.args)
    for name, value in values.items():
        if name not in schedules:
            found |= fingerprint_of(value, name)
    for name, schedule in schedules.items():
        found |= {f"{name} at step {step}": schedule(step) for step in (0, options.steps // 2, options.steps - 1)}
    found |= {"finds": options.step_rule is not StepRule.FIXED, "stops": options.stop_early}
    found |= {"restarts": options.restarts, "seed": options.seed}
    found |= {name: value for name, value in report.items() if name not in values}
    return {**found, "dtype": str(problem.dtype), "device": problem.device.type}


def require_same_fit(group: ProcessGroup, problem: FitProblem, options: FitOptions) -> None:
    """Check that all processes fit the same problem under the same options.

    Raises
    ------
    ValueError
        If they do not, in all of them, with what differs.
    """
    mine = fingerprint_of_fit(problem, options)
    differ = describe_differences(group.first(lambda: mine), mine)
    words = group.told(f"process {group.rank} (here) and process 0 (there): {'; '.join(differ)}" if differ else None)
    if words is not None:
        advice = "call fit with the same model, options and whole data in each, of which it takes its part"
        raise spoken(ValueError(f"the processes were asked for different fits, {words}: {advice}"), 0)
    if options.checkpoint_folder is not None:
        group.hint = (
            f"the checkpoint in {options.checkpoint_folder.folder} is kept: start all of them again, or another "
            "number, with resume=True (--resume), and the fit goes on"
        )


def _name(option: Any) -> Any:
    return getattr(option, "__name__", type(option).__name__) if callable(option) else option
