"""The commands: what they print and refuse, and that a fit that is refused leaves nothing."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LinearRegression

from inference.cli.commands import FitFlags, main
from inference.cli.prediction_files import FileOptions
from inference.cli.runs import Run
from inference.svi.options import FitOptions
from tests.helpers.command_line import MY_MODULE, RUN_FILES, fit_arguments, frame, names_in, refused, tensors_in

pytestmark = pytest.mark.usefixtures("few_draws", "blank_figures")


def test_fit_prints_the_error_of_the_held_out_rows_and_where_the_report_is(fitted):
    run = Run.read(fitted.folder)
    split = run.split()
    (x, y), (x_test, y_test) = split.train, split.test
    mean = run.posterior(fitted.folder).predict(x_test).mean.numpy()
    plain = LinearRegression().fit(x, y).predict(x_test)
    lines = fitted.printed.splitlines()
    assert lines[0] == "linear_regression on houses.csv: 32 rows to fit, 8 held out"
    assert lines[1].split() == ["test", "RMSE", f"{np.sqrt(np.mean((mean - y_test) ** 2)):.2f}"]
    assert lines[2].split() == ["least", "squares,", "same", "rows", f"{np.sqrt(np.mean((plain - y_test) ** 2)):.2f}"]
    inside = [line for line in lines if line.startswith("  inside the ")]
    assert [line.split()[2] for line in inside] == ["50%", "80%", "90%", "95%"]
    assert any(line.startswith("  CRPS a row") for line in lines)
    assert lines[-1] == f"report: {fitted.folder / 'report.html'}"


def test_the_same_seed_gives_the_same_posterior_and_another_does_not(fitted, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        assert main(fit_arguments(fitted.table, tmp_path / name, seed=seed)) == 0
    folders = (fitted.folder, tmp_path / "same", tmp_path / "other")
    first, same, other = (tensors_in(folder) for folder in folders)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["losses"], other["losses"])


def test_diagnose_says_that_sixty_steps_are_too_few(run, capsys):
    assert main(["diagnose", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "verdict: don't trust"
    assert re.fullmatch(r"  Pareto k-hat \d+\.\d\d ± \d+\.\d\d \(at most 0\.57\)", lines[1])
    assert "  because 60 steps are too few to see whether the ELBO has settled" in lines
    assert "  try: take at least 200 steps" in lines


def test_diagnose_trusts_a_fit_that_lands(here, capsys):
    guide = "pyro.infer.autoguide:AutoMultivariateNormal"
    arguments = fit_arguments("houses.csv", "run", steps=1000, guide=guide, set="noise=0.3")
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["diagnose", "run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "verdict: trust"


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "kiln", "list"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "linear_regression" in done.stdout


def test_holdout_0_fits_every_row_and_scores_none(here, capsys):
    assert main(fit_arguments("houses.csv", "run", holdout=0)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "linear_regression on houses.csv: 40 rows to fit, 0 held out",
        "report: run/report.html",
    ]
    assert names_in(here / "run") == RUN_FILES


BAD_FITS = {
    "unknown model": ({"model": "no_such_model"}, ["'no_such_model'", "linear_regression", "module:function"]),
    "module that is not there": ({"model": "nowhere:model"}, ["'nowhere:model'", "no module 'nowhere'"]),
    "function that is not there": ({"model": "mymodel:lost"}, ["module 'mymodel' has no 'lost'"]),
    "model that is a number": ({"model": "mymodel:number"}, ["mymodel:number", "3"]),
    "model without a module": ({"model": ":model"}, ["':model'"]),
    "relative module": ({"model": ".mymodel:model"}, ["'.mymodel:model'"]),
    "module with a typing error": ({"model": "mytypo:model"}, ["mytypo", "invalid syntax"]),
    "module with a bad import": ({"model": "myimport:model"}, ["myimport", "cannot import name 'nothing'"]),
    "module that raises": ({"model": "myerror:model"}, ["myerror", "no luck"]),
    "unknown guide": ({"guide": "no_such_guide"}, ["'no_such_guide'", "mean_field_normal", "module:function"]),
    "missing file": ({"data": "lost.csv"}, ["'lost.csv'", "kiln list"]),
    "file of another kind": ({"data": "mymodel.py"}, ["mymodel.py", ".csv", ".parquet", ".npz"]),
    "text column": ({"data": "text.csv"}, ["text.csv", "'age'", "'old'"]),
    "NaN cell": ({"data": "nan.csv"}, ["nan.csv", "'age'", "row 2"]),
    "infinite cell": ({"data": "inf.csv"}, ["inf.csv", "'age'", "row 2"]),
    "NaN in an NPZ": ({"data": "nan.npz", "target": None}, ["nan.npz", "x1"]),
    "empty file": ({"data": "empty.csv"}, ["empty.csv is empty"]),
    "table without rows": ({"data": "header.csv"}, ["header.csv has no rows"]),
    "missing target column": ({"target": "cost"}, ["houses.csv has no column 'cost'", "'price'", "--target"]),
    "target of a named data set": ({"data": "diabetes", "target": "bmi"}, ["diabetes", "'progression'", "--target"]),
    "target not given": ({"target": None}, ["houses.csv", "'price'", "--target"]),
    "no steps": ({"steps": 0}, ["steps is 0"]),
    "step size of NaN": ({"lr": "nan"}, ["lr is nan"]),
    "step size below 0": ({"lr": -1}, ["lr is -1"]),
    "no particles": ({"particles": 0}, ["particles is 0"]),
    "empty batches": ({"batch-size": 0}, ["batch_size is 0"]),
    "unknown optimiser": ({"optimizer": "magic"}, ["'magic'", "adam"]),
    "unknown engine": ({"engine": "steam"}, ["'steam'", "eager"]),
    "seed below 0": ({"seed": -1}, ["seed", "-1"]),
    "GPU that is not there": ({"device": "cuda:99"}, ["'cuda:99'", "cpu"]),
    "device that is none": ({"device": "abacus"}, ["'abacus'", "cpu"]),
    "output folder under a file": ({"out": "houses.csv/run"}, ["houses.csv/run", "--out"]),
    "output folder that is a file": ({"out": "houses.csv"}, ["houses.csv", "--out"]),
    "--set without a value": ({"set": "hidden"}, ["--set 'hidden'", "NAME=VALUE"]),
    "--set of what is no name": ({"set": "[4]=hidden"}, ["--set '[4]=hidden'", "NAME=VALUE"]),
    "--set of an unknown option": ({"set": "hidden=[4]"}, ["linear_regression", "'hidden'"]),
    "--set of an impossible value": ({"set": "noise=-1"}, ["noise is -1"]),
    "--holdout of everything": ({"holdout": 1}, ["--holdout is 1.0"]),
    "--holdout below 0": ({"holdout": -0.1}, ["--holdout is -0.1"]),
    "--holdout of NaN": ({"holdout": "nan"}, ["--holdout is nan"]),
    "--holdout that leaves no row": ({"holdout": 0.999}, ["40 rows", "lower --holdout"]),
}


@pytest.fixture
def bad(here):
    table = frame()
    table.assign(age="old").to_csv("text.csv", index=False)
    table.assign(age=table["age"].where(table.index != 2)).to_csv("nan.csv", index=False)
    table.assign(age=table["age"].where(table.index != 2, np.inf)).to_csv("inf.csv", index=False)
    table[:0].to_csv("header.csv", index=False)
    Path("empty.csv").write_text("")
    np.savez("nan.npz", x=pd.read_csv("nan.csv")[["size", "age"]].to_numpy(), y=table["price"].to_numpy())
    Path("mymodel.py").write_text(MY_MODULE)
    Path("mytypo.py").write_text("def model(:\n")
    Path("myimport.py").write_text("from math import nothing\n")
    Path("myerror.py").write_text("raise RuntimeError('no luck')\n")
    return here


@pytest.mark.parametrize(("changed", "words"), BAD_FITS.values(), ids=BAD_FITS)
def test_a_fit_that_cannot_be_is_refused_in_one_line_and_leaves_nothing(bad, capsys, changed, words):
    said = refused(capsys, fit_arguments(**{"data": "houses.csv", "out": "run", **changed}))
    assert [word for word in words if word not in said] == []
    left = {path.name for path in bad.rglob("*")}
    assert not left & set(RUN_FILES)
    assert not [name for name in left if name.endswith(".partial") or name.startswith("tmp")]


def test_a_fit_that_diverges_says_at_which_step_and_keeps_the_state_before(here, capsys):
    assert main(fit_arguments("houses.csv", "run", lr=1e30)) == 1
    printed = capsys.readouterr()
    assert re.match(r"kiln: site '\w+' in the (model|guide) has a .* at step \d+: ", printed.err.splitlines()[-1])
    assert printed.out == ""
    assert names_in(here / "run") == [".kiln.lock", "checkpoint-HASH.safetensors", "checkpoint.json"]
    assert main(fit_arguments("houses.csv", "run")) == 0  # a fit that failed may be replaced
    assert names_in(here / "run") == RUN_FILES


def test_a_refused_fit_leaves_an_older_run_as_it_was(run, fitted, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "steps is 0" in refused(capsys, fit_arguments(fitted.table, run, steps=0))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_errors_come_with_their_traceback_where_it_is_asked_for(here, monkeypatch):
    monkeypatch.setenv("KILN_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"^steps is 0"):
        main(fit_arguments("houses.csv", "run", steps=0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit", "linear_regression", "--out", "run"], "--data"),
        (["fit", "linear_regression", "--data", "houses.csv"], "--out"),
        (["fit", "--data", "houses.csv", "--out", "run"], "MODEL"),
        (fit_arguments("houses.csv", "run", steps="many"), "--steps"),
        (["predict", "run", "--data", "houses.csv"], "--out"),
        (["report"], "DIR"),
        (["guess"], "guess"),
        (["list", "--all"], "--all"),
    ],
    ids=[
        "no data",
        "no out",
        "no model",
        "steps in words",
        "nowhere to predict to",
        "no run",
        "no command",
        "no option",
    ],
)
def test_wrong_usage_gives_status_2_and_names_the_argument(here, capsys, arguments, named):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "Usage: kiln" in printed.err
    assert named in printed.err
    assert not (here / "run").exists()


def test_what_would_steer_the_terminal_is_spelt_out(here, capsys):
    frame().rename(columns={"size": "\x1b[31msize\u202e"}).to_csv("houses.csv", index=False)
    assert main(fit_arguments("houses.csv", "run", target="\x1b]0;title\x07")) == 1
    assert main(["predict", "\x1b[2Jrun", "--data", "houses.csv", "--out", "p.csv"]) == 1
    said = capsys.readouterr().err
    assert r"\x1b[2Jrun is not a run" in said
    assert not [c for c in said if not c.isprintable() and c != "\n"]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in ("fit", "report", "predict", "diagnose", "list") if name not in printed] == []


def test_a_fit_that_finds_its_own_steps_says_why_it_stopped(here, capsys, monkeypatch):
    monkeypatch.setattr("inference.optim.averaged_adam._FIRST", 400)
    monkeypatch.setattr("inference.optim.averaged_adam._SETTLE", 100)
    status = main(fit_arguments("houses.csv", "run", optimizer="auto", steps=600, engine="eager"))
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert re.search("converged after|settled after|ceiling of steps", printed.out)
    assert re.search("converged after|settled after|ceiling of steps", Path("run/report.html").read_text())


def test_every_option_of_a_fit_is_a_flag_or_is_left_to_python():
    flags = {field.name: field.default for field in fields(FitFlags)}
    options = {field.name: field.default for field in fields(FitOptions)}
    assert options.keys() - flags.keys() == {"init", "stop", "dtype", "checkpoint", "progress", "callbacks"}
    assert {name for name in flags.keys() & options.keys() if flags[name] != options[name]} == {"steps"}


def test_help_shows_each_flag_with_the_words_of_its_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for command, flags in (("fit", FitFlags), ("predict", FileOptions)):
        assert main([command, "--help"]) == 0
        printed = capsys.readouterr().out
        names = {field.name.strip("_").replace("_", "-") for field in fields(flags)} - {"model"}
        assert [name for name in names if f"--{name} " not in printed] == []
        assert command == "predict" or FitOptions.help_of("restarts") in printed
