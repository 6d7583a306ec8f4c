"""The fits of a calibration on disk, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.model.bound_model import name_of
from inference.storage.atomic_files import make_folder
from inference.storage.json_document import TEXT, WHOLE, check, digest, either, list_of, read_json, record, write_json
from inference.svi.calibration.simulation import Outcome, Simulation
from inference.utils.errors import printable
from inference.utils.versions import versions

__all__ = ["CalibrationFolder"]

MANIFEST = "calibration.json"
SCHEMA = 1
_CALIBRATION = "calibration"
_KIND = record(calibration=TEXT, number=WHOLE, ranks=either(None, list_of(WHOLE)), error=either(None, TEXT))


class CalibrationFolder:
    """A folder with what was asked, and a small JSON file for each fit, each whole or not there.

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
        asked = _manifest(simulation)
        self._name = digest(asked)
        try:
            _refuse_another(path, read_json(path / MANIFEST, SCHEMA), asked)
        except FileNotFoundError:
            write_json(path / MANIFEST, asked, SCHEMA)

    def read(self, fits: int) -> list[Outcome]:
        """Those of the first ``fits`` that are there, in order."""
        found = (self._read(number) for number in range(fits))
        return [outcome for outcome in found if outcome is not None]

    def keep(self, outcome: Outcome) -> None:
        """Write one."""
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
        self._refuse_impossible(path, outcome)
        return outcome

    def _refuse_impossible(self, path: Path, outcome: Outcome) -> None:
        ranks, simulation = outcome.ranks, self._simulation
        whole = ranks is not None and len(ranks) == len(simulation.names) and max(ranks, default=0) <= simulation.draws
        if not whole and (ranks is not None or outcome.error is None):
            raise ValueError(
                f"{path} has no {len(simulation.names)} ranks from 0 to {simulation.draws}, nor an error: delete it, "
                "and its fit is made again"
            )

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


def _refuse_another(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differ = [name for name in asked if there.get(name) != asked[name]]
    if differ:
        what = "; ".join(
            f"{name} is {printable(there.get(name))[:200]} there and {asked[name]} here" for name in differ
        )
        raise ValueError(f"{path} holds another calibration: {what}: ask for the same, or give another path")


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
    """SHA-256 over the values of tensors, and what others are called."""
    digest = hashlib.sha256()
    for value in inputs:
        if isinstance(value, Tensor):
            array = value.cpu().numpy()
            digest.update(repr((array.shape, str(array.dtype))).encode() + array.tobytes())
        else:
            digest.update(repr(_described(value)).encode())
    return digest.hexdigest()
