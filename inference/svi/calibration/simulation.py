"""Fits to data that the model made, the rank of the truth among the draws of each, and their outcomes on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from inference.data.arguments import argument_names, as_tensors
from inference.model.bound_model import BoundModel, device_for, name_of, named_failure
from inference.model.elbo import Model
from inference.model.improper_priors import DrawableFlats
from inference.model.sites import Site, base_distribution, observed_nodes, scalars
from inference.storage.atomic_files import make_folder
from inference.storage.json_document import (
    TEXT,
    WHOLE,
    check,
    digest,
    either,
    list_of,
    read_json,
    record,
    versions,
    write_json,
)
from inference.svi.fitting import fit
from inference.svi.options import FitOptions
from inference.utils.errors import printable
from inference.utils.random_state import RandomStream, environment
from inference.utils.validation import as_dtype

__all__ = ["CalibrationFolder", "Outcome", "Simulation", "check_options"]

OWN = {"seed", "progress", "callbacks", "checkpoint", "resume"}  # options of ``fit`` that a calibration sets itself
MANIFEST = "calibration.json"
SCHEMA = 1
_CALIBRATION = "calibration"
_KIND = record(calibration=TEXT, number=WHOLE, ranks=either(None, list_of(WHOLE)), error=either(None, TEXT))


@dataclass(frozen=True)
class Outcome:
    """Result of one fit: the rank of each truth among the draws, or the message of the error that ended it."""

    number: int
    ranks: list[int] | None
    error: str | None = None


@dataclass(frozen=True)
class Simulation:
    """Everything that a fit to simulated data needs, in whatever process it runs.

    ``inputs`` are the arguments of the model with None for those it observes,
    ``observed`` names the sites that those come from, by position, ``latents``
    the sites that q has, and ``names`` their scalars, which are ranked.
    """

    model: Model
    guide_builder: Callable[[Model], Model]
    inputs: tuple[Any, ...]
    observed: Mapping[int, str]
    latents: tuple[str, ...]
    names: tuple[str, ...]
    draws: int
    seed: int
    options: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        model: Model,
        guide_builder: Callable[[Model], Model],
        data: tuple[Any, ...],
        draws: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> Simulation:
        """Check that data can be simulated, by doing so once.

        Raises
        ------
        ValueError
            If the model has a flat prior, observes nothing or something that is
            no argument of its own, or does not run without its observations.
        """
        where, kind = device_for(options.get("device", "auto"), model), as_dtype(options.get("dtype"))
        args = as_tensors(data, argument_names(model, len(data)), where, kind)
        with _apart(seed, where, kind):
            trace = named_failure("model", model, args, lambda: poutine.trace(DrawableFlats()(model)).get_trace(*args))
            _refuse_unfit(trace, name_of(model))
            guide = _built(guide_builder, model)
        bound_model = BoundModel.start(model, guide, args, RandomStream.seeded(seed), where, kind, check_values=False)
        observed = _arguments_of(bound_model.observed)
        # What is observed is left out, unless nothing else says how many rows there are.
        sized = any(isinstance(v, Tensor) and v.dim() > 0 and i not in observed for i, v in enumerate(args))
        inputs = tuple(None if sized and i in observed else value for i, value in enumerate(args))
        latents = tuple(site.name for site in bound_model.latents)
        found = cls(model, guide_builder, inputs, observed, latents, (), draws, seed, options, where, kind)
        truth, made = named_failure("model", model, found.inputs, lambda: found.simulate(seed))
        for position, site in observed.items():
            if made[position].shape != args[position].shape:
                raise ValueError(
                    f"site {site!r} has shape {tuple(made[position].shape)} when the model makes it, but its data has "
                    f"{tuple(args[position].shape)}: give data of the shape that the model makes"
                )
        return replace(found, names=tuple(_scalars(truth)))

    def simulate(self, seed: int) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
        """Latents z* ~ p(z), (1, *site shape), and the arguments of the model with y* ~ p(y | z*) in place."""
        with _apart(seed, self.device, self.dtype), torch.no_grad():
            trace = poutine.trace(poutine.uncondition(self.model)).get_trace(*self.inputs)
        made = {position: trace.nodes[site]["value"] for position, site in self.observed.items()}
        args = tuple(made.get(i, value) for i, value in enumerate(self.inputs))
        return {name: trace.nodes[name]["value"][None] for name in self.latents}, args

    def run(self, number: int) -> Outcome:
        """Simulate, fit and rank; the numbers depend on ``seed`` and ``number`` alone.

        The rank of z* is the count of the L draws from q below it, ties broken
        at random, a whole number from 0 to L.
        """
        seeds = np.random.SeedSequence([self.seed, number]).generate_state(4).tolist()
        with _one_thread():
            try:
                truth, args = named_failure("model", self.model, self.inputs, lambda: self.simulate(seeds[0]))
                with _apart(seeds[1], self.device, self.dtype):
                    guide = self.guide_builder(self.model)
                posterior = fit(self.model, guide, *args, seed=seeds[1], progress=False, **self.options)
                if posterior.record.stop is not None and posterior.record.stop.interrupted:
                    raise KeyboardInterrupt  # half a fit is no outcome
                drawn = posterior.sample(self.draws, seed=seeds[2])
            except ValueError as error:
                return Outcome(number, None, str(error))
        true, draws = _scalars(truth), _scalars(drawn)
        generator = np.random.default_rng(seeds[3])
        return Outcome(number, [_rank(true[name], draws[name], generator) for name in self.names])


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a ValueError that names an option which ``fit`` does not have, or which is not the caller's to set."""
    allowed = [option.name for option in fields(FitOptions) if option.name not in OWN]
    for name in options:
        if name not in allowed:
            raise ValueError(f"{name!r} is no option of calibrate(), nor of its fits: give some of {allowed}")


def _rank(truth: np.ndarray, draws: np.ndarray, generator: np.random.Generator) -> int:
    below, ties = int((draws < truth).sum()), int((draws == truth).sum())
    return below + int(generator.integers(ties + 1))


def _scalars(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return scalars({name: value.detach().cpu().numpy() for name, value in values.items()})


def _built(guide_builder: Callable[[Model], Model], model: Model) -> Model:
    """Return the guide, or raise a ValueError that says what was expected."""
    wanted = "give what is called as guide_builder(model) and returns a guide, such as full_rank_normal"
    try:
        guide = guide_builder(model)
    except Exception as error:
        raise ValueError(f"the guide builder {name_of(guide_builder)!r} failed: {error}: {wanted}") from error
    if not callable(guide):
        raise ValueError(f"the guide builder {name_of(guide_builder)!r} returned {type(guide).__name__}: {wanted}")
    return guide


def _arguments_of(sites: tuple[Site, ...]) -> dict[int, str]:
    """Return the names of the observed sites by the position of the argument that they hold."""
    found: dict[int, str] = {}
    for site in sites:
        if site.argument is None:
            raise ValueError(
                f"site {site.name!r} observes something made from the arguments, where simulated data has no place: "
                "give the model what it observes as an argument"
            )
        found[site.argument] = site.name
    return found


def _refuse_unfit(trace: poutine.Trace, name: str) -> None:
    """Raise a ValueError where nothing can be drawn from a prior, or nothing is observed."""
    for site, node in trace.nodes.items():
        if node["type"] == "sample" and isinstance(base_distribution(node["fn"]), dist.ImproperUniform):
            raise ValueError(
                f"site {site!r} of the model {name!r} has a flat prior, from which nothing can be drawn: give it a "
                "proper one, such as a wide Normal"
            )
    if not observed_nodes(trace):
        raise ValueError(f"the model {name!r} observes nothing on this data: give what it observes too, as to fit()")


@contextmanager
def _apart(seed: int, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Give the block random numbers, defaults and a parameter store of its own."""
    stream = RandomStream.seeded(seed)
    with stream.active(), environment(device, dtype, validate=False), pyro.get_param_store().scope():
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    outside = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(outside)


class CalibrationFolder:
    """Folder with what a calibration was asked for, and a small JSON file for each of its fits.

    Raises
    ------
    ValueError
        If the folder holds a calibration that was asked for otherwise, with
        what differs, or a damaged file.
    OSError
        If it cannot be written.
    """

    def __init__(self, path: Path, simulation: Simulation) -> None:
        make_folder(path)
        self._path = path
        self._simulation = simulation
        own = _manifest(simulation)
        self._name = digest(own)
        try:
            there = read_json(path / MANIFEST, SCHEMA)
        except FileNotFoundError:
            write_json(path / MANIFEST, own, SCHEMA)
            return
        differ = [name for name in own if there.get(name) != own[name]]
        if differ:
            what = "; ".join(
                f"{name} is {printable(there.get(name))[:200]} there and {own[name]} here" for name in differ
            )
            raise ValueError(f"{path} holds another calibration: {what}: ask for the same, or give another path")

    def read(self, fits: int) -> list[Outcome]:
        """Return the outcomes of the first ``fits`` that are there, in order."""
        found = (self._read(number) for number in range(fits))
        return [outcome for outcome in found if outcome is not None]

    def keep(self, outcome: Outcome) -> None:
        """Write an outcome."""
        write_json(self._file(outcome.number), {**vars(outcome), _CALIBRATION: self._name}, SCHEMA)

    def _read(self, number: int) -> Outcome | None:
        path = self._file(number)
        try:
            found = read_json(path, SCHEMA)
            check(path, found, _KIND)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{error}; or delete it, and its fit is made again") from error
        if (found.pop(_CALIBRATION), found["number"]) != (self._name, number):
            raise ValueError(f"{path} is of another calibration or another fit: delete it, and its fit is made again")
        outcome = Outcome(**found)
        ranks, simulation = outcome.ranks, self._simulation
        whole = ranks is not None and len(ranks) == len(simulation.names) and max(ranks, default=0) <= simulation.draws
        if not whole and (ranks is not None or outcome.error is None):
            raise ValueError(
                f"{path} has no {len(simulation.names)} ranks from 0 to {simulation.draws}, nor an error: delete it, "
                "and its fit is made again"
            )
        return outcome

    def _file(self, number: int) -> Path:
        return self._path / f"fit_{number:06d}.json"


def _manifest(simulation: Simulation) -> dict[str, Any]:
    return {
        "model": _described(simulation.model),
        "guide": _described(simulation.guide_builder),
        "parameters": list(simulation.names),
        "draws": simulation.draws,
        "seed": simulation.seed,
        "options": {name: _described(value) for name, value in sorted(simulation.options.items())},
        "dtype": _described(simulation.dtype),
        "inputs": _digest(simulation.inputs),
        "versions": versions(),
    }


def _described(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, partial):
        given = [*map(str, map(_described, value.args)), *(f"{k}={_described(v)}" for k, v in value.keywords.items())]
        return f"{_described(value.func)}({', '.join(given)})"
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple | dict):
        return str(value)
    return name_of(value)


def _digest(inputs: tuple[Any, ...]) -> str:
    """Return the SHA-256 of the values of tensors and of the descriptions of other inputs."""
    found = hashlib.sha256()
    for value in inputs:
        if isinstance(value, Tensor):
            array = value.cpu().numpy()
            found.update(repr((array.shape, str(array.dtype))).encode() + array.tobytes())
        else:
            found.update(repr(_described(value)).encode())
    return found.hexdigest()
