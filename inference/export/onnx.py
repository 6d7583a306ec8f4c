"""The mean of a posterior predictive as an ONNX file, by torch's own exporter."""

from __future__ import annotations

import importlib.util
import io
import operator
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inference.export.graph_recording import NON_NUMERIC_ARGUMENTS, ExportedGraph, NotExportable
from inference.export.predictive_function import PredictiveFunction
from inference.export.runtime.operators import RANDOM
from inference.storage.atomic_files import replacing

__all__ = ["write_onnx"]


def write_onnx(
    function: PredictiveFunction, recording: ExportedGraph, latents: Mapping[str, np.ndarray], path: Path
) -> Path:
    """Write x → ``mean`` and ``variance``, or ``probs`` for classes, over the S draws, for any number of rows.

    Raises
    ------
    NotExportable
        If the packages onnx and onnxscript are missing, if the graph draws
        random numbers, or if torch's exporter refuses it.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotExportable(f"torch writes ONNX with packages that are not here: pip install {' '.join(missing)}")
    inputs = function.inputs(4)
    network = _Mean(recording, latents, function, len(inputs)).eval()
    rows = torch.export.Dim("rows")
    shapes = tuple({0: rows} if value.dim() else {} for value in inputs.values())
    names = ["probs"] if function.classes else ["mean", "variance"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # torch's to itself
                exported = torch.onnx.export(
                    *(network, tuple(inputs.values())),
                    input_names=list(inputs),
                    output_names=names,
                    dynamic_shapes=(shapes,),
                    dynamo=True,
                    verbose=False,
                )
        except RuntimeError as error:  # of which those of the exporter are
            problem = str(error).strip().splitlines()
            raise NotExportable(
                f"torch cannot write this model as ONNX: {problem[0] if problem else type(error).__name__}"
            ) from error
        if exported is None:
            raise NotExportable("torch's exporter gave nothing back")
        exported.save(partial)
    return path


class _Mean(nn.Module):
    """The recorded operators in torch again, and moments over the draws."""

    def __init__(
        self, recording: ExportedGraph, latents: Mapping[str, np.ndarray], function: PredictiveFunction, inputs: int
    ) -> None:
        super().__init__()
        if recording.graph["each"]:
            raise NotExportable("the draws of this model run one by one, which makes no graph: use .npz")
        self.graph, self.operators, self.classes, self.inputs = (
            recording.graph,
            recording.operators,
            function.classes,
            inputs,
        )
        arrays = {**latents, **recording.arrays}
        for i, spec in enumerate(self.graph["constants"]):
            if "array" in spec:
                seen = np.transpose(arrays[spec["array"]].reshape(spec["shape"]), spec["order"])
                self.register_buffer(f"constant{i}", torch.tensor(seen))
        self.needed = self._reached()
        first = inputs + len(self.graph["constants"])
        drawn = [
            node[0] for i, node in enumerate(self.graph["nodes"]) if first + i in self.needed and node[0] in RANDOM
        ]
        if drawn:
            raise NotExportable(f"the mean depends on random numbers ({drawn[0]}), as an autoencoder's: use .npz")

    def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
        """The moments at rows x."""
        rows = next((value.shape[0] for value in x if value.dim()), 1)
        values: dict[int, Any] = dict(enumerate(x))
        for i, spec in enumerate(self.graph["constants"]):
            if "rows" in spec:
                values[self.inputs + i] = torch.arange(rows)
            else:
                constant: Tensor = getattr(self, f"constant{i}")
                values[self.inputs + i] = constant.expand([_read(size, {}, rows) for size in spec["sizes"]])
        first = self.inputs + len(self.graph["constants"])
        for i, (_, given, *_) in enumerate(self.graph["nodes"]):
            if first + i in self.needed:
                values[first + i] = self._called(self.operators[i], [_read(arg, values, rows) for arg in given])
        draws = values[self.graph["outputs"]["draws"]]
        if self.classes:
            return (draws.mean(0),)
        return draws.mean(0), draws.var(0, correction=0) + values[self.graph["outputs"]["variance"]].mean(0)

    def _called(self, func: Any, given: list[Any]) -> Any:
        if func is operator.getitem:
            return func(*given)
        schema = [argument for argument in func._schema.arguments if argument.name not in NON_NUMERIC_ARGUMENTS]
        pairs = list(zip(schema, given, strict=True))
        keywords = {argument.name: value for argument, value in pairs if argument.kwarg_only}
        return func(*(value for argument, value in pairs if not argument.kwarg_only), **keywords)

    def _reached(self) -> set[int]:
        """The values that the moments need."""
        first = self.inputs + len(self.graph["constants"])
        reached = {place for name, place in self.graph["outputs"].items() if name != "samples"}
        for i in reversed(range(len(self.graph["nodes"]))):
            if first + i in reached:
                reached |= set(_references(self.graph["nodes"][i][1]))
        return reached


def _read(value: Any, values: dict[int, Any], rows: Any) -> Any:
    if isinstance(value, list):
        return [_read(part, values, rows) for part in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "n":
            constant, slope = content
            return constant + slope * rows
        return values[content] if kind == "v" else getattr(torch, content)
    return value


def _references(value: Any) -> list[int]:
    if isinstance(value, list):
        return [place for part in value for place in _references(part)]
    return [value["v"]] if isinstance(value, dict) and "v" in value else []
