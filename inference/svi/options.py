"""What a fit is asked to do, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from inference.data.arguments import argument_names, as_tensors
from inference.data.batch_loader import BatchLoader
from inference.data.batched_dataset import BatchedDataset, batches, on_disk
from inference.data.generated_dataset import GeneratedBatches, GeneratedDataset
from inference.model.bound_model import device_for
from inference.model.elbo import Model
from inference.optim.annealing import TemperingSchedule, as_tempering_schedule
from inference.optim.initialization.strategies import InitStrategy, as_init_strategy
from inference.optim.optimizers import optimizer_class
from inference.optim.schedules import LearningRate, as_schedule
from inference.storage.checkpoint import Checkpoint
from inference.svi.callbacks.base import Callback, as_callbacks
from inference.svi.restarts import Restarts
from inference.utils.validation import as_dtype, flag, one_of, positive_integer, positive_number, seed_number

__all__ = ["checked"]

USUAL_LR = 0.01
LONG = 1_000  # steps from which a fit is worth the search of its start


def checked(
    model: Model,
    guide: Model,
    data: tuple[Any, ...],
    *,
    steps: int,
    lr: LearningRate | None,
    optimizer: str | Callable[..., Optimizer] | None,
    init: InitStrategy,
    stop: str,
    particles: int,
    batch_size: int | None,
    seed: int,
    device: str | torch.device,
    dtype: torch.dtype | str | None,
    engine: str,
    anneal: int | TemperingSchedule | None,
    restarts: int,
    checkpoint: str | Path | Checkpoint | None,
    progress: bool,
    callbacks: Sequence[Callback],
) -> Restarts:
    """What ``fit`` was asked to do, or an error that names what is unfit."""
    steps = positive_integer(steps, "steps")
    own = lr is not None or anneal is not None
    auto = isinstance(optimizer, str) and optimizer == "auto"
    if own and auto:
        raise ValueError("optimizer='auto' finds its own steps: leave lr and anneal out")
    kind_of_step = "adam" if auto or optimizer is None else optimizer
    optimizer_class(kind_of_step)
    finds = auto or (optimizer is None and not own and steps >= LONG)
    init, early = as_init_strategy(init), _early(stop, finds)
    if lr is None:
        lr = USUAL_LR
    elif callable(lr):
        lr = as_schedule(lr, steps)
    else:
        lr = positive_number(lr, "lr")
    particles = positive_integer(particles, "particles")
    restarts = positive_integer(restarts, "restarts")
    power = as_tempering_schedule(anneal, steps)
    batch_size = None if batch_size is None else positive_integer(batch_size, "batch_size")
    engine = one_of(engine, "engine", ("auto", "eager", "compiled"))
    progress, callbacks = flag(progress, "progress"), as_callbacks(callbacks)
    where, kind = device_for(device, model, guide), as_dtype(dtype)
    args, names, drawn = _data(model, data, where, kind, seed_number(seed), batch_size)
    whole = batch_size is None and not drawn
    read = drawn.get("batches")
    said = {
        "steps": steps,
        "lr": f"{_name(lr)} from {lr(0):g}" if callable(lr) else lr,
        "optimizer": _name("adam" if optimizer is None else optimizer),
        "particles": particles,
        "batch_size": batch_size if read is None else read.batch_size,
        "anneal": _name(anneal),
        "init": init if isinstance(init, str) else sorted(init),
    } | ({} if read is None else {"num_data": read.num_data})
    return Restarts(
        model=model,
        guide=guide,
        args=args,
        names=names,
        device=where,
        dtype=kind,
        batch_size=batch_size if read is None else None,
        options={"optimizer": kind_of_step, "lr": lr, "particles": particles, "anneal": power, **drawn},
        steps=steps,
        seed=seed_number(seed),
        engine=engine,
        init=init,
        finds=finds,
        searches=whole and finds,
        asked=optimizer is not None,
        early=early,
        restarts=restarts,
        callbacks=callbacks,
        progress=progress,
        said=said,
        checkpoint=Checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint,
    )


def _early(stop: str, finds: bool) -> bool:
    one_of(stop, "stop", ("auto", "converged", "steps"))
    if stop == "converged" and not finds:
        raise ValueError("stop='converged' goes with steps that are found: pass optimizer='auto', and leave lr out")
    return stop != "steps"


def _data(
    model: Model,
    data: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    batch_size: int | None,
) -> tuple[tuple[Any, ...], list[str], dict[str, Any]]:
    """The arguments of the model, what it calls them, and what gives others at each step, if anything does."""
    if batch_size is not None and on_disk(data):
        data = (batches(*data),)
    if not any(isinstance(value, GeneratedDataset | BatchedDataset) for value in data):
        names = argument_names(model, len(data))
        return as_tensors(data, names, device, dtype), names, {}
    if len(data) > 1:
        kind = "fresh data stand" if any(isinstance(value, GeneratedDataset) for value in data) else "batches stand"
        raise ValueError(f"{kind} alone, found {len(data)} arguments: let them give all of them")
    names = argument_names(model, 100)
    if isinstance(data[0], GeneratedDataset):
        feed = GeneratedBatches(data[0], names, device, dtype, seed)
        return feed.first, names[: len(feed.first)], {"feed": feed}
    read = BatchLoader(data[0], names, device, dtype, batch_size, seed)
    return read.first, names[: len(read.first)], {"batches": read}


def _name(option: Any) -> Any:
    return getattr(option, "__name__", type(option).__name__) if callable(option) else option
