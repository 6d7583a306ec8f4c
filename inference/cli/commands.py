"""Command line: ``kiln fit | report | predict | diagnose | list``."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from torch import nn

from inference.cli import registry
from inference.cli.prediction_files import FileOptions, check_ending, is_store, write_prediction
from inference.cli.runs import (
    REPORT,
    Run,
    Split,
    check_writable,
    compare_runs,
    data_for,
    evaluate,
    least_squares_rmse,
    report_run,
    split_rows,
    write_run_report,
)
from inference.data.arguments import sha256_of
from inference.diagnostics.checks import Diagnosis
from inference.engine.process_group import launched, speaks, who
from inference.model.protocols import HasUsualFit, HasUsualGuide, supports
from inference.optim.schedules import cosine_decay
from inference.posterior import Posterior
from inference.predictive.autoencoder import EvidenceScores
from inference.predictive.scoring import ClassScores, Scores
from inference.storage.checkpoint import Checkpoint
from inference.svi.fitting import run_fit
from inference.svi.options import FitOptions, FitProblem
from inference.utils.errors import printable
from inference.utils.validation import as_device, positive_integer, positive_number, seed_number

__all__ = ["FitFlags", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
COMPARISON, USUAL_GUIDE, USUAL_LR = "comparison.html", "mean_field_normal", 0.02
MANY_ROWS = 10_000

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, as `kiln fit --out` writes it.")]
OwnCode = Annotated[
    bool, typer.Option("--own-code", help="Import and run the model and guide that DIR names by module:function.")
]


def _help(name: str) -> Any:
    """Return a flag that is described as the option ``name`` of :func:`~inference.fit` is."""
    return typer.Option(help=FitOptions.help_of(name))


@dataclass(frozen=True, kw_only=True)
class FitFlags:
    """Arguments of ``kiln fit``; those with the name of a field of :class:`FitOptions` are passed on as that option."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name from `kiln list`, or your own module:function.")]
    data: Annotated[str, typer.Option(help="A CSV, Parquet or NPZ file, or a name from `kiln list`.")]
    out: Annotated[Path, typer.Option(help="Folder to which the posterior and its report are written.")]
    target: Annotated[str | None, typer.Option(help="The column to predict.")] = None
    guide: Annotated[
        str | None,
        typer.Option(help="A name from `kiln list`, or your own module:function; the one usual for MODEL if left out."),
    ] = None
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A keyword argument of the model, in JSON.")
    ] = None
    holdout: Annotated[float, typer.Option(help="Share of the rows that are held out to test the fit.")] = 0.2
    steps: Annotated[int, _help("steps")] = 5000
    lr: Annotated[
        float | None,
        typer.Option(help="Initial step size; if left out, the one usual for MODEL, or else one that is found."),
    ] = None
    decay: Annotated[bool, typer.Option(help="Let the step size fall to 0 as half a cosine.")] = True
    optimizer: Annotated[str | None, _help("optimizer")] = None
    particles: Annotated[int, _help("particles")] = 1
    anneal: Annotated[int | None, _help("anneal")] = None
    restarts: Annotated[int, _help("restarts")] = 1
    batch_size: Annotated[
        int | None, typer.Option(help="Number of rows per step; as usual for MODEL, or else all, if left out.")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the split, the initial values and all draws.")] = 0
    device: Annotated[str, _help("device")] = "auto"
    engine: Annotated[str, _help("engine")] = "auto"
    resume: Annotated[bool, typer.Option("--resume", help=FitOptions.help_of("resume"))] = False


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of flags: to typer, each of their fields is a parameter of its own."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += inspect.signature(groups[parameter.name], eval_str=True).parameters.values()
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**words: Any) -> None:
        for name, group in groups.items():
            words[name] = group(**{each.name: words.pop(each.name) for each in fields(group)})
        command(**words)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: status 0, 1 with one line on standard error where the input is wrong, or 2 for usage."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
    warnings.filterwarnings("ignore", message="the fit was interrupted")  # kiln prints a line of its own
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
@with_flags
def fit(flags: FitFlags) -> None:
    """Fit MODEL to a table, test it on rows that were held out, and write a report.

    Under torchrun the processes share the rows of each step; the first of them writes and prints.
    """
    run, split, model = prepare_run(flags)
    usual = {"lr": None, "batch_size": None} | dict(model.usual_fit if supports(model, HasUsualFit) else {})
    batch_size = usual["batch_size"] if flags.batch_size is None else flags.batch_size
    rows = len(split.train[0])
    with launched(flags.device) as leads, ExitStack() as stack:
        checkpoint = Checkpoint(flags.out)
        if leads:
            check_writable(flags.out)
            if batch_size is None and rows > MANY_ROWS:
                hint = f"each step takes all {rows:,} rows; --batch-size 500 would make it faster"
                print(hint, file=sys.stderr)
            stack.enter_context(checkpoint)
        if isinstance(model, nn.Module):
            model.to(as_device(flags.device))
        guide, data = registry.build_guide(run.guide, model), data_for(model, split.train)
        options = options_from_flags(flags, {**usual, "batch_size": batch_size}, checkpoint)
        posterior = run_fit(FitProblem.of(model, guide, data, options), options)
        if leads:
            posterior.save(flags.out)
            run.save(flags.out)
        _end_if_interrupted(posterior, flags.out, leads)
        if leads:
            checkpoint.remove()
            print_summary(posterior, run, split, flags.out)


def prepare_run(flags: FitFlags) -> tuple[Run, Split, Any]:
    """Read the table, split its rows and build the model, and return them with what ``run.json`` says."""
    if not 0 <= flags.holdout < 1:
        raise ValueError(f"--holdout is {flags.holdout}: give a share from 0 up to, not with, 1")
    registry.find("models", flags.model)
    table = registry.read_table(flags.data, flags.target)
    split = split_rows(table, flags.holdout, seed_number(flags.seed))
    bound = registry.suggested_options(flags.model, *split.train) | _assignments(flags.set_ or [])
    model = registry.build_model(flags.model, bound, flags.seed)
    run = Run(
        model=flags.model,
        guide=flags.guide or (model.usual_guide if supports(model, HasUsualGuide) else USUAL_GUIDE),
        options=bound,
        data=flags.data if flags.data in registry.names("data") else str(Path(flags.data).resolve()),
        target=table.target,
        columns=list(table.columns),
        holdout=flags.holdout,
        seed=flags.seed,
        data_sha256=sha256_of(table.x, table.y),
    )
    return run, split, model


def options_from_flags(flags: FitFlags, usual: Mapping[str, Any], checkpoint: Checkpoint) -> FitOptions:
    """Return the options of the fit; ``usual`` holds step size and batch size where the flags leave them out.

    The step size stays None where it is to be found: under ``--optimizer auto``, and if
    neither the flags nor the model say anything of it.
    """
    lr = usual["lr"] if flags.lr is None else flags.lr
    if flags.optimizer == "auto" or (lr is None and flags.optimizer is None and flags.anneal is None):
        lr = None
    else:
        lr = positive_number(USUAL_LR if lr is None else lr, "lr")
        if flags.decay:
            lr = cosine_decay(lr, positive_integer(flags.steps, "steps"))
    given = {each.name: getattr(flags, each.name) for each in fields(FitOptions) if hasattr(flags, each.name)}
    return FitOptions(**{**given, "lr": lr, "batch_size": usual["batch_size"], "checkpoint": checkpoint})


def print_summary(posterior: Posterior, run: Run, split: Split, folder: Path) -> None:
    """Print how the fit ended and how it scores on the rows that were held out, and write its report to ``folder``."""
    _say(f"{run.model} on {Path(run.data).name}: {len(split.train[0])} rows to fit, {len(split.test[0])} held out")
    if posterior.record.stop is not None:
        _say(f"  {posterior.stop_reason}")
    held_out = evaluate(posterior, split)
    if held_out is not None:
        _print_scores(held_out.scores, split)
    path = write_run_report(posterior, run, split, folder / REPORT, held_out)
    _say(f"report: {path}")


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
@with_flags
def predict(
    folder: Folder,
    data: Annotated[str, typer.Option(help="A table with the columns of the fit, or an array of them, .npy or .zarr.")],
    out: Annotated[Path, typer.Option(help="CSV, Parquet or NPZ file to write, or a .zarr for all draws.")],
    options: FileOptions,
    own_code: OwnCode = False,
) -> None:
    """Predict new rows: mean, standard deviation and interval; or their codes, where the model makes whole rows."""
    check_ending(out, options)
    check_writable(out.parent)
    run = Run.read(folder, own_code)
    rows = registry.read_rows(data, run.target, run.columns)
    try:
        write_prediction(run.posterior(folder), rows, out, options)
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
            found = registry.find(group, name)
            lines = (getattr(found, "func", found).__doc__ or "").strip().splitlines()
            print(f"  {name:<20} {lines[0] if lines else ''}")
    print("Your own model or guide is module:function; your own data a CSV, Parquet or NPZ file.")


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


def _end_if_interrupted(posterior: Posterior, folder: Path, leads: bool) -> None:
    """Leave with the status of a program that a signal ended, and say how to go on."""
    stop = posterior.record.stop
    if stop is None or stop.interrupted is None:
        return
    if leads:
        _say(f"the fit {stop.message}; {folder} has the posterior so far", file=sys.stderr)
        print("the same command with --resume goes on with it", file=sys.stderr)
    raise typer.Exit(128 + signal.Signals[stop.interrupted])


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
