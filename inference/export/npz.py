"""A posterior taken away: a file of plain arrays, and beside it the one module that reads it with NumPy alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

import numpy as np

from inference.engine.tracing.tracer import Untraceable
from inference.export.graph_recording import ExportedGraph, NotExportable, export_graph
from inference.export.onnx import write_onnx
from inference.export.predictive_function import PredictiveFunction
from inference.export.runtime.predictor import LATENT, MANIFEST, SCHEMA, Predictor
from inference.export.standalone import MARK, module_source
from inference.export.verification import verified
from inference.model.vectorization import VMAP_ERRORS, may_be_of_vmap
from inference.storage.atomic_files import replacing
from inference.utils.versions import versions

__all__ = ["write_predictor"]


def write_predictor(asked: PredictiveFunction, path: Path, names: Mapping[str, str]) -> Path:
    """Record what ``asked`` computes, compare it with torch, and write ``path`` and the module of the same stem.

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
        return write_onnx(asked, _recording(asked), _latents(asked), path)
    module = _module_path(path)
    recording = _recording(asked)
    arrays = {**_latents(asked), **recording.arrays}
    manifest = _manifest(asked, recording, names)
    predictor = Predictor(json.loads(json.dumps(manifest)), arrays)
    manifest |= verified(predictor, asked, recording)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as numbers, replacing(module) as source:
        with numbers.open("wb") as stream:
            np.savez_compressed(stream, **{MANIFEST: np.array(json.dumps(manifest))}, **arrays)  # type: ignore[arg-type]
        source.write_text(module_source(path.stem), encoding="utf-8")
    return path


def _recording(asked: PredictiveFunction) -> ExportedGraph:
    """All draws together where torch can, else one draw, to be run for each."""
    rows, known = asked.two_counts(), _latents(asked)
    with asked.running():  # the tape holds on to parameters, which have the fit's values only here
        try:
            found = export_graph(asked.together, asked.inputs, rows, known)
            return _completed(found, False, [])
        except (Untraceable, NotExportable, *VMAP_ERRORS) as reason:
            if isinstance(reason, VMAP_ERRORS) and not may_be_of_vmap(reason):
                raise
            try:
                found = export_graph(asked.each, asked.inputs_with_latents, rows, known)
            except (Untraceable, NotExportable) as error:
                if isinstance(reason, NotExportable):
                    raise reason from None
                raise NotExportable(f"the model cannot be taken away: {error}") from reason
            return _completed(found, True, list(asked.shared))


def _latents(asked: PredictiveFunction) -> dict[str, np.ndarray]:
    return {LATENT + name: value for name, value in asked.latent_arrays().items()}


def _completed(recording: ExportedGraph, each: bool, latents: list[str]) -> ExportedGraph:
    recording.graph.update(each=each, latents=latents)
    if not each:
        del recording.row_shape[0]
    return recording


def _manifest(asked: PredictiveFunction, recording: ExportedGraph, names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": "kiln predictor",
        "schema": SCHEMA,
        **names,
        "site": asked.site,
        "kind": "classes" if asked.classes else "numbers",
        "draws": asked.draws,
        "seed": asked.seed,
        "dtype": str(asked.bound_model.dtype).removeprefix("torch."),
        "inputs": asked.described_inputs(),
        "row_shape": recording.row_shape,
        "latents": {name: list(value.shape[1:]) for name, value in asked.latent_arrays().items()},
        "rows_apart": False,
        "numbers_a_row": recording.numbers_a_row,
        "versions": versions(),
        "graph": recording.graph,
    }


def _module_path(path: Path) -> Path:
    """Where the module goes, if it neither hides another by its name nor replaces a file of the user's."""
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
