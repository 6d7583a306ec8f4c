"""Run folders: a saved posterior, the names of its model, guide, data and split, and reports of one run or several."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from inference.cli import registry
from inference.data.arguments import sha256_of
from inference.posterior import Posterior, load
from inference.predictive.autoencoder import HeldOutRows
from inference.predictive.scoring import HeldOut, Scores
from inference.reporting.comparison import compare_report
from inference.reporting.report import write_report
from inference.reporting.section import Labels
from inference.storage import posterior_archive
from inference.storage.atomic_files import ADVICE, cache_folder, is_private, newest_first
from inference.storage.json_document import (
    ANY,
    NUMBER,
    SEED,
    TEXT,
    check,
    digest,
    list_of,
    mapping_of,
    read_json,
    record,
    write_json,
)
from inference.utils.errors import printable

__all__ = [
    "REPORT",
    "Run",
    "Split",
    "check_writable",
    "compare_runs",
    "data_for",
    "evaluate",
    "least_squares_rmse",
    "report_run",
    "split_rows",
    "write_run_report",
]

REPORT = "report.html"
MANIFEST, SCHEMA = "run.json", 1
_REMEMBERED = 10_000  # runs
_POSTERIOR = "posterior"
_KIND = record(
    model=TEXT,
    guide=TEXT,
    options=mapping_of(ANY),
    data=TEXT,
    target=TEXT,
    columns=list_of(TEXT),
    holdout=NUMBER,
    seed=SEED,
    data_sha256=TEXT,
    posterior=TEXT,
)


@dataclass(frozen=True)
class Split:
    """Training and held-out rows; the second pair may be empty."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Run:
    """Arguments of ``kiln fit`` that are needed to load the posterior and its data again."""

    model: str
    guide: str
    options: dict[str, Any]
    data: str
    target: str
    columns: list[str]
    holdout: float
    seed: int
    data_sha256: str

    def save(self, folder: Path) -> None:
        """Write ``run.json`` beside the posterior in ``folder``, to which it then belongs, and remember it."""
        content = {**asdict(self), _POSTERIOR: posterior_archive.identity(folder)}
        write_json(folder / MANIFEST, content, SCHEMA)
        _remember(digest(content))

    @classmethod
    def read(cls, folder: Path, own_code: bool = False) -> Run:
        """Read ``run.json``, or raise saying what is wrong with the folder.

        A model or guide by ``module:function`` is imported and run, and a folder
        may come from anywhere: it is refused unless this user made it on this machine,
        or ``own_code`` says that it may be.
        """
        path = folder / MANIFEST
        try:
            found = read_json(path, SCHEMA)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} is not a run: it has no {MANIFEST}; make one with `kiln fit … --out {folder}`"
            ) from error
        check(path, found, _KIND)
        name = digest(found)
        if found.pop(_POSTERIOR) != posterior_archive.identity(folder):
            raise ValueError(
                f"{path} belongs to another posterior than {posterior_archive.MANIFEST} beside it: {ADVICE}"
            )
        run = cls(**found)
        marker = _marker(name)
        if not own_code and (marker is None or not is_private(marker)):
            run._refuse_code(path)
        return run

    def _refuse_code(self, path: Path) -> None:
        for group, reference in (("models", self.model), ("guides", self.guide)):
            if registry.is_own_code(group, reference):
                raise ValueError(
                    f"{path} was not made here and names {reference!r}, code that would be imported and run: "
                    "if you know it, say --own-code"
                )

    def bind(self) -> Any:
        """Return the model with its options."""
        return registry.build_model(self.model, self.options, self.seed)

    def posterior(self, folder: Path, *data: np.ndarray) -> Posterior:
        """Return the saved posterior, with the data if given."""
        model = self.bind()
        return load(folder, model, registry.build_guide(self.guide, model), *data)

    def split(self) -> Split:
        """Read the data again, and return the training and test rows.

        Raises
        ------
        ValueError
            If the data is not what it was at the fit.
        """
        table = registry.read_table(self.data, self.target)
        if sha256_of(table.x, table.y) != self.data_sha256:
            raise ValueError(f"{self.data} has changed since the fit: fit again, or bring the old file back")
        return split_rows(table, self.holdout, self.seed)

    def labels(self) -> Labels:
        """Return the names that the report shows."""
        name, target, model = (printable(text) for text in (Path(self.data).name, self.target, self.model))
        return Labels(f"{target} by {model}", f"{name}, target {target}", [printable(c) for c in self.columns], target)


def _remember(name: str) -> None:
    """Note that the user made the ``run.json`` whose content has this hash, so that its code is known to be theirs."""
    with suppress(OSError):
        marker = _marker(name)
        if marker is not None:
            marker.touch(mode=0o600)
            for old in newest_first(marker.parent)[_REMEMBERED:]:
                old.unlink(missing_ok=True)


def _marker(name: str) -> Path | None:
    """Return the file that marks a ``run.json`` with this hash, in a folder that only the user can write to."""
    known = cache_folder("runs")
    return None if known is None else known / name


def split_rows(table: Any, holdout: float, seed: int) -> Split:
    """Hold out the published test rows where the table has them, else a random share ``holdout``.

    Raises
    ------
    ValueError
        If no row would be left to fit on.
    """
    rows = np.arange(len(table.x))
    count = max(1, round(holdout * len(rows))) if holdout > 0 else 0
    if count >= len(rows):
        raise ValueError(f"holding out {holdout:.0%} of {len(rows)} rows leaves none to fit on: lower --holdout")
    if count == 0:
        test = rows[:0]
    elif table.test_rows is not None:
        test = np.asarray(table.test_rows)
    else:
        test = train_test_split(rows, test_size=count, random_state=seed)[1]
    train = np.setdiff1d(rows, test)
    return Split((table.x[train], table.y[train]), (table.x[test], table.y[test]))


def data_for(model: Any, rows: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """(x, y) for a model that takes both, x alone for one of the rows themselves."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters.values()
    except (TypeError, ValueError):  # it has none, or an option that it does not know is bound: the fit says so
        return rows
    many = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return rows if many or sum(p.kind in kinds for p in parameters) > 1 else rows[:1]


def check_writable(folder: Path) -> None:
    """Check that ``folder`` can be written, so that no fit is lost at its end; the check leaves nothing behind."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {folder}: {error.strerror}; choose another --out"
        ) from error
    finally:
        for place in made:
            if place.is_dir():
                place.rmdir()


def least_squares_rmse(split: Split) -> float:
    """Test RMSE of ordinary least squares with an intercept, the yardstick of every regression."""
    (x, y), (x_test, y_test) = split.train, split.test
    design = np.c_[np.ones(len(x)), x]
    weights = np.linalg.lstsq(design, y, rcond=None)[0]
    return float(np.sqrt(np.mean((np.c_[np.ones(len(x_test)), x_test] @ weights - y_test) ** 2)))


def evaluate(posterior: Posterior, split: Split) -> HeldOut | HeldOutRows | None:
    """Return the evaluation on the rows that were held out, or None if there are none."""
    return posterior.evaluate(*data_for(posterior.bound_model.model, split.test)) if len(split.test[0]) else None


def write_run_report(
    posterior: Posterior, run: Run, split: Split, path: Path, held_out: HeldOut | HeldOutRows | None
) -> Path:
    """Write the report of a posterior of ``run``, with least squares beside the RMSE of a regression."""
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
    """Return the last part of each path, or the whole path if two have the same last part."""
    places = [folder.resolve() for folder in folders]
    twice = next((str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice: give each run once")
    short = [place.name for place in places]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
