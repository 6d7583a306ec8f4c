"""Files that ``kiln predict`` writes: a table with one line per predicted row, or all draws as a Zarr store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from inference.data.row_arrays import rows_of
from inference.posterior import Posterior
from inference.predictive.prediction import ClassPrediction, Prediction, tails
from inference.storage.atomic_files import replacing

__all__ = ["FileOptions", "check_ending", "is_store", "write_prediction"]

STORE = ".zarr"


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Options of ``kiln predict``, each a flag of the command."""

    draws: Annotated[int, typer.Option(help="Number of posterior draws.")] = 1000
    prob: Annotated[float, typer.Option(help="Share of new observations that the interval is to hold.")] = 0.9
    batch_size: Annotated[int | None, typer.Option(help="Number of rows at a time, which bounds the memory.")] = None
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0
    keep: Annotated[
        str | None,
        typer.Option(help="What a .zarr holds: draws, or summary for the moments and the interval of each row."),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume writing a .zarr that was interrupted; the numbers are the same."),
    ] = False


def check_ending(out: Path, options: FileOptions) -> None:
    """Raise a ValueError unless files with the ending of ``out`` are written, with these options."""
    endings = [*_WRITERS, STORE]
    if out.suffix not in endings:
        raise ValueError(f"--out ends in {out.suffix!r}: give a file that ends in {', '.join(endings)}")
    if not is_store(out):
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder: give the name of a file")
        if options.keep is not None or options.resume:
            raise ValueError(f"--keep and --resume go with an --out that ends in {STORE}, not in {out.suffix}")


def is_store(out: Path) -> bool:
    """Return True if ``out`` is written batch by batch."""
    return out.suffix == STORE


def write_prediction(posterior: Posterior, x: Any, out: Path, options: FileOptions) -> None:
    """Predict the rows ``x``, or encode them where the model makes whole rows, and write that to ``out``.

    Raises
    ------
    ValueError
        As :meth:`Posterior.predict`.
    OSError
        If it cannot be written.
    """
    if is_store(out):
        _write_store(posterior, x, out, options)
        return
    if isinstance(x, Path):
        rows = rows_of(x, "x")
        x = rows.read(0, rows.count)
    if posterior.is_autoencoder:
        encoding = posterior.encode(x, batch_size=options.batch_size)
        moments = (("", encoding.mean), ("_std", encoding.std))
        columns = {f"z{i}{end}": column.numpy() for end, value in moments for i, column in enumerate(value.unbind(1))}
    else:
        found = posterior.predict(x, draws=options.draws, batch_size=options.batch_size, seed=options.seed)
        columns = _columns(found, options.prob)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        _WRITERS[out.suffix](pd.DataFrame(columns), partial)


def _write_store(posterior: Posterior, x: Any, out: Path, options: FileOptions) -> None:
    if posterior.is_autoencoder:
        raise ValueError(f"the model makes whole rows, of which codes are written: give an --out that is no {STORE}")
    lower, upper = tails(options.prob)
    short = options.keep == "summary"
    posterior.predict(
        x,
        draws=options.draws,
        batch_size=options.batch_size,
        seed=options.seed,
        out=out,
        keep=options.keep or "draws",
        quantiles=(lower, 0.5, upper) if short else None,
        resume=options.resume,
    )


def _columns(prediction: Prediction | ClassPrediction, prob: float) -> dict[str, np.ndarray]:
    if isinstance(prediction, ClassPrediction):
        classes = {f"prob_{i}": column.numpy() for i, column in enumerate(prediction.probs.unbind(-1))}
        doubts = {name: getattr(prediction, name).numpy() for name in ("entropy", "mutual_information")}
        return {"label": prediction.labels.numpy(), **classes, **doubts}
    lower, upper = prediction.interval(prob)
    columns = {"mean": prediction.mean, "std": prediction.std, "lower": lower, "upper": upper}
    return {name: value.numpy() for name, value in columns.items()}


def _write_npz(frame: pd.DataFrame, path: Path) -> None:
    with path.open("wb") as stream:
        arrays: dict[str, Any] = {str(name): frame[name].to_numpy() for name in frame}
        np.savez(stream, **arrays)


_WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
    ".npz": _write_npz,
}
