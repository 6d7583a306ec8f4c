"""The command line: ``kiln fit | report | predict | diagnose | list``."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from torch import nn

from inference.cli import registry
from inference.cli.prediction_files import FileOptions, check_ending, is_store, write_prediction
from inference.cli.run_reports import REPORT, compare_runs, evaluate, report_run, write_run_report
from inference.cli.runs import Run, Split, check_writable, data_for, least_squares_rmse, split_rows
from inference.data.array_conversion import sha256_of
from inference.diagnostics.checks import Diagnosis
from inference.engine.process_group import launched, speaks, who
from inference.optim.schedules import LearningRate, cosine_decay
from inference.posterior import Posterior
from inference.predictive.autoencoder import EvidenceScores
from inference.predictive.scoring import ClassScores, Scores
from inference.storage.checkpoint import Checkpoint
from inference.svi.fitting import fit as fit_posterior
from inference.utils.errors import printable
from inference.utils.validation import as_device, positive_integer, positive_number, seed_number

__all__ = ["main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
COMPARISON, USUAL_GUIDE, USUAL_LR = "comparison.html", "mean_field_normal", 0.02
MANY_ROWS = 10_000

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, as `kiln fit --out` makes it.")]
OwnCode = Annotated[
    bool, typer.Option("--own-code", help="Import and run the model and guide that DIR names by module:function.")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: status 0, 1 with one line on standard error where the input is wrong, or 2 for usage."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
    warnings.filterwarnings("ignore", message="the fit was interrupted")  # it is said in a line of its own
    try:
        app(args=list(argv) if argv is not None else None, prog_name="kiln", standalone_mode=True)
    except SystemExit as end:
        return int(end.code or 0)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        if os.environ.get("KILN_TRACEBACK"):
            raise
        if speaks(error):
            _say(f"kiln: {who(error)}{' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("KILN_TRACEBACK"):
            raise
        problem = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
        _say(f"kiln: {problem}; a defect of kiln, KILN_TRACEBACK=1 shows where", file=sys.stderr)
        return 1
    return 0


@app.command()
def fit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name from `kiln list`, or your own module:function.")
    ],
    data: Annotated[str, typer.Option(help="A CSV, Parquet or NPZ file, or a name from `kiln list`.")],
    out: Annotated[Path, typer.Option(help="The folder to write the posterior and its report to.")],
    target: Annotated[str | None, typer.Option(help="The column to predict.")] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            help="A name from `kiln list`, or your own module:function; the one usual for MODEL, if left out."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A keyword argument of the model, in JSON.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="The share of rows kept back to test the fit on.")] = 0.2,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 5000,
    lr: Annotated[
        float | None,
        typer.Option(help="Step size at the start; if left out the one usual for MODEL, or else one that is found."),
    ] = None,
    decay: Annotated[bool, typer.Option(help="Let the step size fall to 0 as half a cosine.")] = True,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adam, adamw, clippedadam or sgd; auto finds start, steps and end, as is done if left out."),
    ] = None,
    particles: Annotated[int, typer.Option(help="Draws a step.")] = 1,
    anneal: Annotated[int | None, typer.Option(help="Steps over which the target rises to its full height.")] = None,
    restarts: Annotated[int, typer.Option(help="Starts, of which the best ELBO is kept.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows a step; as usual for MODEL, or else all, if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes the split, the start and every draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="auto, eager or compiled.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a fit that was interrupted or killed, to the same numbers.")
    ] = False,
) -> None:
    """Fit MODEL to a table, test it on rows that were held out, and write a report.

    Under torchrun the processes share the rows of each step; the first of them writes and prints.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"--holdout is {holdout}: give a share from 0 up to, not with, 1")
    registry.find("models", model)
    table = registry.read_table(data, target)
    split = split_rows(table, holdout, seed_number(seed))
    options = registry.suggested_options(model, *split.train) | _assignments(set_ or [])
    source = data if data in registry.names("data") else str(Path(data).resolve())
    bound = registry.build_model(model, options, seed)
    chosen = guide or str(getattr(bound, "usual_guide", USUAL_GUIDE))
    run = Run(
        model, chosen, options, source, table.target, list(table.columns), holdout, seed, sha256_of(table.x, table.y)
    )
    usual = {"batch_size": None} | getattr(bound, "usual_fit", {})
    batch_size = usual["batch_size"] if batch_size is None else batch_size
    with launched(device) as leads, ExitStack() as stack:
        kept = Checkpoint(out)
        if leads:
            check_writable(out)
            _hint(len(split.train[0]), batch_size)
            stack.enter_context(kept)
        if isinstance(bound, nn.Module):
            bound.to(as_device(device))
        posterior = fit_posterior(
            bound,
            registry.build_guide(chosen, bound),
            *data_for(bound, split.train),
            steps=steps,
            lr=_schedule(usual.get("lr") if lr is None else lr, optimizer, anneal, steps, decay),
            optimizer=optimizer,
            particles=particles,
            anneal=anneal,
            restarts=restarts,
            batch_size=batch_size,
            seed=seed,
            device=device,
            engine=engine,
            checkpoint=kept,
            resume=resume,
        )
        if leads:
            posterior.save(out)
            run.save(out)
        _end_if_interrupted(posterior, out, leads)
        if leads:
            kept.remove()
            _tell(posterior, run, split, out)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders; two or more are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file to write; report.html in the run, or comparison.html here, if left out."),
    ] = None,
    own_code: OwnCode = False,
) -> None:
    """Write the report of a run again, or one that compares several runs side by side."""
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder: give the name of a file")
    one = len(folders) == 1
    _say(report_run(folders[0], out, own_code) if one else compare_runs(folders, out or Path(COMPARISON), own_code))


@app.command()
def predict(
    folder: Folder,
    data: Annotated[str, typer.Option(help="A table with the columns of the fit, or an array of them, .npy or .zarr.")],
    out: Annotated[Path, typer.Option(help="The CSV, Parquet or NPZ file to write, or a .zarr for all draws.")],
    draws: Annotated[int, typer.Option(help="Draws of the posterior.")] = 1000,
    prob: Annotated[float, typer.Option(help="What share of new observations the interval should hold.")] = 0.9,
    batch_size: Annotated[int | None, typer.Option(help="Rows at a time, which bounds the memory.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the draws.")] = 0,
    keep: Annotated[
        str | None, typer.Option(help="Of a .zarr: draws, or summary for moments and interval of each row.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a .zarr that was interrupted, to the same numbers.")
    ] = False,
    own_code: OwnCode = False,
) -> None:
    """Predict new rows: mean, standard deviation and interval; or their codes, where the model makes whole rows."""
    asked = FileOptions(draws, prob, batch_size, seed, keep, resume)
    check_ending(out, asked)
    check_writable(out.parent)
    run = Run.read(folder, own_code)
    rows = registry.read_rows(data, run.target, run.columns)
    try:
        write_prediction(run.posterior(folder), rows, out, asked)
    except KeyboardInterrupt as interrupt:
        if out.exists() and is_store(out):
            print("\nthe same command with --resume goes on with it", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from interrupt
    _say(out)


@app.command()
def diagnose(folder: Folder, own_code: OwnCode = False) -> None:
    """Say whether a run can be trusted, with numbers and reasons."""
    run = Run.read(folder, own_code)
    _print_verdict(run.posterior(folder, *data_for(run.bind(), run.split().train)).diagnose())


@app.command(name="list")
def list_names() -> None:
    """Show the models, guides and data sets that have a name."""
    for group in ("models", "guides", "data"):
        print(f"{group}:")
        for name in registry.names(group):
            print(f"  {name:<20} {_first_line(registry.find(group, name))}")
    print("Your own model or guide is module:function; your own data a CSV, Parquet or NPZ file.")


def _first_line(found: Any) -> str:
    documented = getattr(found, "func", found)
    text = (documented.__doc__ or "").strip().splitlines()
    return text[0] if text else ""


def _assignments(pairs: Sequence[str]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {pair!r} is not NAME=VALUE: write for example --set hidden=[50]")
        try:
            values[name] = json.loads(text)
        except (ValueError, RecursionError):
            values[name] = text
    return values


def _schedule(
    lr: float | None, optimizer: str | None, anneal: int | None, steps: int, decay: bool
) -> LearningRate | None:
    """The step size of an optimiser that was named or needs one; None where it is to be found."""
    if optimizer == "auto" or (lr is None and optimizer is None and anneal is None):
        return None
    lr = positive_number(USUAL_LR if lr is None else lr, "lr")
    return cosine_decay(lr, positive_integer(steps, "steps")) if decay else lr


def _tell(posterior: Posterior, run: Run, split: Split, folder: Path) -> None:
    _say(f"{run.model} on {Path(run.data).name}: {len(split.train[0])} rows to fit, {len(split.test[0])} held out")
    if posterior.record.stop is not None:
        _say(f"  {posterior.stop_reason}")
    held_out = evaluate(posterior, split)
    if held_out is not None:
        _print_scores(held_out.scores, split)
    path = write_run_report(posterior, run, split, folder / REPORT, held_out)
    _say(f"report: {path}")


def _end_if_interrupted(posterior: Posterior, folder: Path, says: bool) -> None:
    """Leave with the status of a program that a signal ended, and say how to go on."""
    stop = posterior.record.stop
    if stop is None or stop.interrupted is None:
        return
    if says:
        _say(f"the fit {stop.how}; {folder} has the posterior so far", file=sys.stderr)
        print("the same command with --resume goes on with it", file=sys.stderr)
    raise typer.Exit(128 + signal.Signals[stop.interrupted])


def _hint(rows: int, batch_size: int | None) -> None:
    if batch_size is None and rows > MANY_ROWS:
        print(f"each step takes all {rows:,} rows; --batch-size 500 would make it faster", file=sys.stderr)


def _print_scores(scores: Scores | ClassScores | EvidenceScores, split: Split) -> None:
    if isinstance(scores, EvidenceScores):
        print(f"  ELBO a row                {scores.elbo:10.2f} nats")
        print(f"  log p(x) a row, at least  {scores.log_evidence:10.2f} nats ({scores.samples} draws)")
        print(f"  active numbers of a code  {scores.active:10d} of {scores.size}")
        return
    if isinstance(scores, ClassScores):
        print(f"  share predicted rightly   {scores.accuracy:10.3f}")
        print(f"  Brier score               {scores.brier:10.3f}")
        print(f"  calibration error         {scores.calibration_error:10.3f}")
    else:
        print(f"  test RMSE                 {scores.rmse:10.2f}")
        print(f"  least squares, same rows  {least_squares_rmse(split):10.2f}")
        for found in scores.coverage:
            print(f"  inside the {found.prob:.0%} interval   {found.share:10.1%} ± {2 * found.standard_error:.1%}")
        print(f"  CRPS a row                {scores.crps:10.4g}")
    print(f"  log likelihood a row      {scores.log_likelihood:10.3f} nats")


def _print_verdict(diagnosis: Diagnosis) -> None:
    print(f"verdict: {diagnosis.verdict}")
    if diagnosis.khat is not None and diagnosis.khat_threshold is not None:
        limit = f"at most {diagnosis.khat_threshold:.2f}"
        print(f"  Pareto k-hat {diagnosis.khat:.2f} ± {diagnosis.khat_spread:.2f} ({limit})")
    state = diagnosis.convergence
    print(f"  ELBO gain over the last quarter {state.gain:.3g} ± {state.gain_se:.2g} nats")
    for reason in diagnosis.reasons:
        _say(f"  because {reason}")
    for advice in diagnosis.advice:
        _say(f"  try: {advice}")


def _say(words: Any, file: TextIO | None = None) -> None:
    """Print a line, with what would steer the terminal spelt out: names come from files."""
    print(printable(words), file=file)
