"""Export to NumPy: a file of plain arrays, and beside it the one module that reads it, which imports NumPy alone."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inference.data.arguments import row_count
from inference.engine.tracing.random_ops import ReplayRandomOps
from inference.engine.tracing.tracer import Untraceable
from inference.export.graph_recording import ExportedGraph, NotExportable, export_graph
from inference.export.onnx import write_onnx
from inference.export.predictive_function import PredictiveFunction
from inference.export.runtime import graph, layers, operators, predictor
from inference.export.runtime.operators import RANDOM
from inference.export.runtime.predictor import LATENT, MANIFEST, SCHEMA, Predictor
from inference.model.vectorization import VMAP_ERRORS, may_be_of_vmap
from inference.storage.atomic_files import replacing
from inference.storage.json_document import versions

__all__ = ["module_source", "write_predictor"]

MARK = '"""A fitted model that predicts with NumPy alone, written by Kiln.'
_MODULES = (layers, operators, graph, predictor)
_HEAD = """{mark}

    import {stem}
    p = {stem}.load().predict(x)
    p.mean, p.std, p.interval(0.9), p.draws    # or p.probs, p.labels, p.entropy

It reads {stem}.npz, beside it, and needs Python 3.10 and NumPy 1.26 or newer.
\"\"\"

from __future__ import annotations

{imports}

Array = Any


{bodies}
"""
_ROWS = (1, 4)
_TOLERANCE = {"float32": 3e-5, "float64": 1e-10}  # of the largest number; sums of 784 in single precision reach 4e-6


def write_predictor(function: PredictiveFunction, path: Path, names: Mapping[str, str]) -> Path:
    """Record what ``function`` computes, compare it with torch, and write ``path`` and the module of the same stem.

    A path that ends in ``.onnx`` is written by :func:`~inference.export.onnx.write_onnx` instead.
    ``names`` are of model and guide. Nothing is written where anything fails.

    Raises
    ------
    NotExportable
        If the model cannot be written with operators of NumPy, or does not
        come out as in torch.
    ValueError
        If the module would stand in the way of another.
    """
    if path.suffix == ".onnx":
        return write_onnx(function, _recording(function), _latents(function), path)
    module = _module_path(path)
    recording = _recording(function)
    arrays = {**_latents(function), **recording.arrays}
    manifest = _manifest(function, recording, names)
    runtime = Predictor(json.loads(json.dumps(manifest)), arrays)
    manifest |= _verified(runtime, function, recording)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as numbers, replacing(module) as source:
        with numbers.open("wb") as stream:
            np.savez_compressed(stream, **{MANIFEST: np.array(json.dumps(manifest))}, **arrays)  # type: ignore[arg-type]
        source.write_text(module_source(path.stem), encoding="utf-8")
    return path


def _recording(function: PredictiveFunction) -> ExportedGraph:
    """All draws together where torch can, else one draw, to be run for each."""
    rows, known = function.two_counts(), _latents(function)
    with function.running():  # the tape holds on to parameters, which have the fit's values only here
        try:
            found = export_graph(function.together, function.inputs, rows, known)
            return _completed(found, False, [])
        except (Untraceable, NotExportable, *VMAP_ERRORS) as reason:
            if isinstance(reason, VMAP_ERRORS) and not may_be_of_vmap(reason):
                raise
            try:
                found = export_graph(function.each, function.inputs_with_latents, rows, known)
            except (Untraceable, NotExportable) as error:
                if isinstance(reason, NotExportable):
                    raise reason from None
                raise NotExportable(f"the model cannot be taken away: {error}") from reason
            return _completed(found, True, list(function.shared))


def _latents(function: PredictiveFunction) -> dict[str, np.ndarray]:
    return {LATENT + name: value for name, value in function.latent_arrays().items()}


def _completed(recording: ExportedGraph, each: bool, latents: list[str]) -> ExportedGraph:
    recording.graph.update(each=each, latents=latents)
    if not each:
        del recording.row_shape[0]
    return recording


def _manifest(function: PredictiveFunction, recording: ExportedGraph, names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": "kiln predictor",
        "schema": SCHEMA,
        **names,
        "site": function.site,
        "kind": "classes" if function.classes else "numbers",
        "draws": function.draws,
        "seed": function.seed,
        "dtype": str(function.bound_model.dtype).removeprefix("torch."),
        "inputs": function.described_inputs(),
        "row_shape": recording.row_shape,
        "latents": {name: list(value.shape[1:]) for name, value in function.latent_arrays().items()},
        "rows_apart": False,
        "numbers_a_row": recording.numbers_a_row,
        "versions": versions(),
        "graph": recording.graph,
    }


def _module_path(path: Path) -> Path:
    """Return the path of the module, which may neither hide another by its name nor replace a file of the user's."""
    module = path.with_suffix(".py")
    if path.suffix != ".npz":
        raise ValueError(f"{path.name} is of no known kind: end it in .npz, for NumPy, or in .onnx")
    taken = iskeyword(path.stem) or path.stem in sys.stdlib_module_names or path.stem == "numpy"
    if taken or not path.stem.isidentifier():
        raise ValueError(
            f"{path.stem!r} cannot be imported as a module of its own: give another name, as predictor.npz"
        )
    if module.exists() and not module.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        raise ValueError(f"{module} is there already and was not written by export: give another name or folder")
    return module


def module_source(stem: str) -> str:
    """The source of the module that reads ``<stem>.npz``."""
    whole: set[str] = set()
    parts: dict[str, set[str]] = {}
    bodies = []
    for module in _MODULES:
        text = inspect.getsource(module)
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                whole.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom):
                parts.setdefault(node.module or "", set()).update(ast.unparse(name) for name in node.names)
            elif not isinstance(node, ast.Expr) and not ast.unparse(node).startswith(("__all__", "Array =")):
                continue
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
        bodies.append("\n".join(lines).strip())
    theirs = {name: found for name, found in parts.items() if not name.startswith(("inference", "__future__"))}
    froms = [f"from {name} import {', '.join(sorted(found))}" for name, found in sorted(theirs.items())]
    imports = "\n".join([*sorted(whole), *froms])
    return _HEAD.format(mark=MARK, stem=stem, imports=imports, bodies="\n\n\n".join(bodies))


def _verified(predictor: Predictor, function: PredictiveFunction, recording: ExportedGraph) -> dict[str, Any]:
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
