"""A predictor compared with torch before anybody gets it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from inference.data.arguments import row_count
from inference.engine.tracing.random_ops import ReplayRandomOps
from inference.export.graph_recording import ExportedGraph, NotExportable
from inference.export.predictive_function import PredictiveFunction
from inference.export.runtime.operators import RANDOM
from inference.export.runtime.predictor import Predictor

__all__ = ["verified"]

_ROWS = (1, 4)
_TOLERANCE = {"float32": 3e-5, "float64": 1e-10}  # of the largest number; sums of 784 in single precision reach 4e-6


def verified(predictor: Predictor, function: PredictiveFunction, recording: ExportedGraph) -> dict[str, Any]:
    """Return how far NumPy is from torch on rows of the fit, relative to the largest number, and if rows stand apart.

    Both are given the same random numbers, NumPy's.

    Raises
    ------
    NotExportable
        If they differ by more than rounding.
    """
    worst = max(_difference(predictor, function, recording, rows) for rows in _ROWS)
    bound = _TOLERANCE[str(function.bound_model.dtype).removeprefix("torch.")]
    if not worst <= bound:
        raise NotExportable(
            f"NumPy differs from torch by {worst:.1g} of the largest number, more than {bound}: "
            "the model cannot be taken away"
        )
    return {"agreement": worst, "rows_apart": _rows_apart(predictor, function)}


def _difference(predictor: Predictor, function: PredictiveFunction, recording: ExportedGraph, rows: int) -> float:
    wanted = ("draws",) if function.classes else ("draws", "variance")
    made: list[dict[int, np.ndarray]] = []

    def keep(place: int, operator: str, given: list[Any]) -> np.ndarray:
        if not made or place in made[-1]:
            made.append({})
        made[-1][place] = RANDOM[operator](np.random.default_rng([function.seed, rows, place, len(made)]), *given)
        return made[-1][place]

    inputs = function.inputs(rows)
    count = row_count(tuple(inputs.values())) or 1
    found = predictor.run([value.cpu().numpy() for value in inputs.values()], count, [0], wanted, keep)
    expected = _by_torch(function, inputs, recording, made)
    pairs = [(value, expected[name].cpu().numpy()) for name, value in zip(wanted, found, strict=True)]
    return max(_relative(value, other) for value, other in pairs)


def _by_torch(
    function: PredictiveFunction,
    inputs: dict[str, torch.Tensor],
    recording: ExportedGraph,
    made: list[dict[int, np.ndarray]],
) -> dict[str, torch.Tensor]:
    """Compute the answers by torch, its random calls answered by ``made``, one set of numbers for each run."""
    graph = recording.graph
    first = len(inputs) + len(graph["latents"]) + len(graph["constants"])

    def replay(numbers: dict[int, np.ndarray]) -> ReplayRandomOps:
        kinds = {place: getattr(torch, graph["nodes"][place - first][2]) for place in numbers}
        given = {
            place: torch.as_tensor(value).to(function.bound_model.device, kinds[place])
            for place, value in numbers.items()
        }
        return ReplayRandomOps([None if place is None else given.get(place) for place in recording.calls])

    if not graph["each"]:
        with replay(made[0] if made else {}):
            return function.together(inputs)
    found = []
    for s in range(function.draws):
        z = {name: value[s] for name, value in function.shared.items()}
        with replay(made[s] if made else {}):
            found.append(function.each({**inputs, **z}))
    return {name: torch.stack([part[name] for part in found]) for name in found[0]}


def _relative(value: np.ndarray, other: np.ndarray) -> float:
    if value.shape != other.shape:
        return float("inf")
    scale = float(np.abs(other).max(initial=0)) or 1.0
    return float(np.abs(value.astype(np.float64) - other).max(initial=0)) / scale


def _rows_apart(predictor: Predictor, function: PredictiveFunction) -> bool:
    """Return True if rows come out the same alone as together, with all random numbers at their median."""
    inputs = [value.cpu().numpy() for value in function.inputs(_ROWS[-1]).values()]
    if function.two_counts() is None:
        return False
    rows = len(next(value for value in inputs if value.ndim))

    def part(begin: int, end: int) -> np.ndarray:
        cut = [value[begin:end] if value.ndim else value for value in inputs]
        return predictor.run(cut, end - begin, [0], ("draws",), lambda _, name, given: RANDOM[name](_Still(), *given))[
            0
        ]

    try:
        whole, parts = part(0, rows), np.concatenate([part(0, 1), part(1, rows)], 1)
    except ValueError:  # a random number that has no middle
        return False
    return _relative(parts, whole) <= 1e-5


class _Still:
    """A generator of the middles of its distributions."""

    def standard_normal(self, shape: Any) -> np.ndarray:
        """Zeros."""
        return np.zeros(shape)

    def random(self, shape: Any) -> np.ndarray:
        """Halves."""
        return np.full(shape, 0.5)
