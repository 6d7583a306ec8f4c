"""What ``kiln predict`` writes: one table of what is predicted of each row, or all draws as a Zarr store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from inference.data.row_arrays import rows_of
from inference.posterior import Posterior
from inference.predictive.autoencoder import Encoding
from inference.predictive.prediction import ClassPrediction, Prediction, tails
from inference.storage.atomic_files import replacing

__all__ = ["FileOptions", "check_ending", "is_store", "write_prediction"]

STORE = ".zarr"


@dataclass(frozen=True)
class FileOptions:
    """The options of the command."""

    draws: int
    prob: float
    batch_size: int | None
    seed: int
    keep: str | None
    resume: bool


def check_ending(out: Path, asked: FileOptions) -> None:
    """Raise a ValueError unless files with the ending of ``out`` are written, with these options."""
    endings = [*_WRITERS, STORE]
    if out.suffix not in endings:
        raise ValueError(f"--out ends in {out.suffix!r}: give a file that ends in {', '.join(endings)}")
    if not is_store(out):
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder: give the name of a file")
        if asked.keep is not None or asked.resume:
            raise ValueError(f"--keep and --resume go with an --out that ends in {STORE}, not in {out.suffix}")


def is_store(out: Path) -> bool:
    """Whether ``out`` is written batch by batch."""
    return out.suffix == STORE


def write_prediction(posterior: Posterior, x: Any, out: Path, asked: FileOptions) -> None:
    """Predict the rows ``x``, or encode them where the model makes whole rows, and write that to ``out``.

    Raises
    ------
    ValueError
        As :meth:`Posterior.predict`.
    OSError
        If it cannot be written.
    """
    if is_store(out):
        _write_store(posterior, x, out, asked)
        return
    if isinstance(x, Path):
        rows = rows_of(x, "x")
        x = rows.read(0, rows.count)
    if posterior.is_autoencoder:
        columns = _codes(posterior.encode(x, batch_size=asked.batch_size))
    else:
        found = posterior.predict(x, draws=asked.draws, batch_size=asked.batch_size, seed=asked.seed)
        columns = _columns(found, asked.prob)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        _WRITERS[out.suffix](pd.DataFrame(columns), partial)


def _write_store(posterior: Posterior, x: Any, out: Path, asked: FileOptions) -> None:
    if posterior.is_autoencoder:
        raise ValueError(f"the model makes whole rows, of which codes are written: give an --out that is no {STORE}")
    lower, upper = tails(asked.prob)
    short = asked.keep == "summary"
    posterior.predict(
        x,
        draws=asked.draws,
        batch_size=asked.batch_size,
        seed=asked.seed,
        out=out,
        keep=asked.keep or "draws",
        quantiles=(lower, 0.5, upper) if short else None,
        resume=asked.resume,
    )


def _codes(code: Encoding) -> dict[str, np.ndarray]:
    means = {f"z{i}": column.numpy() for i, column in enumerate(code.mean.unbind(1))}
    return means | {f"z{i}_std": column.numpy() for i, column in enumerate(code.std.unbind(1))}


def _columns(prediction: Prediction | ClassPrediction, prob: float) -> dict[str, np.ndarray]:
    if isinstance(prediction, ClassPrediction):
        classes = {f"prob_{i}": column.numpy() for i, column in enumerate(prediction.probs.unbind(-1))}
        doubts = {name: getattr(prediction, name).numpy() for name in ("entropy", "mutual_information")}
        return {"label": prediction.labels.numpy(), **classes, **doubts}
    lower, upper = prediction.interval(prob)
    columns = {"mean": prediction.mean, "std": prediction.std, "lower": lower, "upper": upper}
    return {name: value.numpy() for name, value in columns.items()}


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, index=False)


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    frame.to_parquet(path, index=False)


def _write_npz(frame: pd.DataFrame, path: Path) -> None:
    with path.open("wb") as stream:
        arrays: dict[str, Any] = {str(name): frame[name].to_numpy() for name in frame}
        np.savez(stream, **arrays)


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".npz": _write_npz}
