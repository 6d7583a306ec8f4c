"""The fits of a calibration on disk, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference import storage
from inference.program import name_of
from inference.simulated import Outcome, Simulation

__all__ = ["CalibrationFolder"]

MANIFEST = "calibration.json"
SCHEMA = 1


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
        storage.make_folder(path)
        self._path = path
        asked = _manifest(simulation)
        if (path / MANIFEST).exists():
            _refuse_another(path, _read(path / MANIFEST), asked)
        else:
            storage.write_json(path / MANIFEST, asked)

    def read(self, fits: int) -> list[Outcome]:
        """Those of the first ``fits`` that are there, in order."""
        files = (self._file(number) for number in range(fits))
        return [Outcome(**_read(file)) for file in files if file.exists()]

    def keep(self, outcome: Outcome) -> None:
        """Write one."""
        storage.write_json(self._file(outcome.number), dict(vars(outcome)))

    def _file(self, number: int) -> Path:
        return self._path / f"fit_{number:06d}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and its fit is made again") from error
    return found


def _manifest(simulation: Simulation) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "model": _described(simulation.model),
        "guide": _described(simulation.guide_builder),
        "parameters": list(simulation.names),
        "draws": simulation.draws,
        "seed": simulation.seed,
        "options": {name: _described(value) for name, value in sorted(simulation.options.items())},
        "dtype": _described(simulation.dtype),
        "inputs": _digest(simulation.inputs),
        "versions": storage.versions(),
    }


def _refuse_another(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differ = [name for name in asked if there.get(name) != asked[name]]
    if differ:
        what = "; ".join(f"{name} is {there.get(name)} there and {asked[name]} here" for name in differ)
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
