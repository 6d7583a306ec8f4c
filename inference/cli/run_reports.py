"""Reports of run folders: of one run, or of several side by side, each tested on the rows that it held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference.cli.runs import Run, Split, check_writable, data_for, least_squares_rmse
from inference.posterior import Posterior
from inference.predictive.autoencoder import HeldOutRows
from inference.predictive.scoring import HeldOut, Scores
from inference.reporting.comparison import compare_report
from inference.reporting.report import write_report

__all__ = ["REPORT", "compare_runs", "evaluate", "report_run", "write_run_report"]

REPORT = "report.html"


def evaluate(posterior: Posterior, split: Split) -> HeldOut | HeldOutRows | None:
    """The evaluation on the rows that were held out; None where there are none."""
    return posterior.evaluate(*data_for(posterior.bound_model.model, split.test)) if len(split.test[0]) else None


def write_run_report(
    posterior: Posterior, run: Run, split: Split, path: Path, held_out: HeldOut | HeldOutRows | None
) -> Path:
    """The report of a posterior of ``run``, with least squares beside the RMSE of a regression."""
    measured = held_out is not None and isinstance(held_out.scores, Scores)
    baselines = {"least squares": least_squares_rmse(split)} if measured else {}
    groups = (split.train if held_out is None else split.test)[1] if posterior.is_autoencoder else None
    options: dict[str, Any] = {"labels": run.labels(), "baselines": baselines, "groups": groups}
    return write_report(posterior, path, held_out=held_out, **options)


def report_run(folder: Path, out: Path | None = None, own_code: bool = False) -> Path:
    """Write the report of a run to ``out``, or into its folder; ``own_code`` as in :meth:`Run.read`."""
    path = out or folder / REPORT
    run = Run.read(folder, own_code)
    check_writable(path.parent)
    split = run.split()
    posterior = run.posterior(folder, *data_for(run.bind(), split.train))
    return write_run_report(posterior, run, split, path, evaluate(posterior, split))


def compare_runs(folders: Sequence[Path], out: Path, own_code: bool = False) -> Path:
    """Write the comparison of several runs to ``out``; ``own_code`` as in :meth:`Run.read`.

    Raises
    ------
    ValueError
        If a run is given twice, or if its data is not what it was at the fit.
    """
    names = _names(folders)
    check_writable(out.parent)
    runs = {name: Run.read(folder, own_code) for name, folder in zip(names, folders, strict=True)}
    splits = {name: run.split() for name, run in runs.items()}
    posteriors = {
        name: run.posterior(folder, *data_for(run.bind(), splits[name].train))
        for (name, run), folder in zip(runs.items(), folders, strict=True)
    }
    tested = {name: evaluate(posterior, splits[name]) for name, posterior in posteriors.items()}
    held_out = {name: found for name, found in tested.items() if found is not None}
    return compare_report(out, posteriors, held_out=held_out, labels={name: run.labels() for name, run in runs.items()})


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two have the same."""
    places = [folder.resolve() for folder in folders]
    twice = next((str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice: give each run once")
    short = [place.name for place in places]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
