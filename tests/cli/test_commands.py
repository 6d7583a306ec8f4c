import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LinearRegression

from inference import open_prediction
from inference.cli import registry
from inference.cli.commands import main
from inference.cli.runs import Run
from inference.data.array_conversion import sha256_of
from inference.predictive.zarr_store import PredictionStore

RUN_FILES = [".kiln.lock", "posterior-HASH.safetensors", "posterior.json", "report.html", "run.json"]
COLUMNS = ["mean", "std", "lower", "upper"]

MY_MODULE = """
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints


def model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ slope, 0.5), obs=y)


def guide(x, y=None):
    loc = pyro.param("loc", torch.zeros(x.shape[1]))
    scale = pyro.param("scale", 0.1 * torch.ones(x.shape[1]), constraint=constraints.positive)
    pyro.sample("slope", dist.Normal(loc, scale).to_event(1))


number = 3
"""


pytestmark = pytest.mark.usefixtures("few_draws", "blank_figures")


@pytest.fixture(autouse=True)
def errors_in_one_line(monkeypatch):
    monkeypatch.delenv("KILN_TRACEBACK", raising=False)


def frame():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 2))
    y = 1 + 2 * x[:, 0] - x[:, 1] + generator.normal(0, 0.3, 40)
    return pd.DataFrame({"size": x[:, 0], "age": x[:, 1], "price": y})


def fit_arguments(data, out, model="linear_regression", **options):
    given = {"data": data, "target": "price", "out": out, "steps": 60, **options}
    pairs = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
    return ["fit", model, *(word for pair in pairs for word in pair)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    table = folder / "houses.csv"
    frame().to_csv(table, index=False)
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()):
        status = main(fit_arguments(table, folder / "run"))
    return SimpleNamespace(status=status, printed=printed.getvalue(), folder=folder / "run", table=table)


@pytest.fixture
def run(fitted, tmp_path):
    return Path(shutil.copytree(fitted.folder, tmp_path / "run"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    loaded = set(sys.modules)
    frame().to_csv("houses.csv", index=False)
    yield tmp_path
    for name in [name for name in set(sys.modules) - loaded if name.startswith("my")]:
        del sys.modules[name]


def names_in(folder):
    return sorted(re.sub("-[0-9a-f]{16}", "-HASH", path.name) for path in folder.iterdir())


def tensors_in(folder):
    (path,) = Path(folder).glob("posterior-*.safetensors")
    return load_file(path)


def refused(capsys, arguments):
    status = main([str(word) for word in arguments])
    printed = capsys.readouterr()
    assert (status, printed.out) == (1, "")
    assert "Traceback" not in printed.err
    assert re.fullmatch(r"kiln: [^\n]+\n", printed.err)
    return printed.err.removeprefix("kiln: ").strip()


def predict(folder, table, out, **options):
    words = [str(word) for name, value in {"draws": 200, **options}.items() for word in (f"--{name}", value)]
    assert main(["predict", str(folder), "--data", str(table), "--out", str(out), *words]) == 0
    return pd.read_csv(out) if out.suffix == ".csv" else None


def test_fit_writes_the_run_and_nothing_else(fitted):
    assert fitted.status == 0
    assert names_in(fitted.folder) == RUN_FILES


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


def test_fit_records_what_was_asked(fitted):
    kept = json.loads((fitted.folder / "run.json").read_text())
    options, digest = kept.pop("options"), kept.pop("data_sha256")
    assert len(kept.pop("sha256")) == len(kept.pop("posterior")) == 64
    x, _ = Run.read(fitted.folder).split().train
    np.testing.assert_allclose(options["scaling"]["x_loc"], x.mean(0))
    assert options["noise"] == "learned"
    assert digest == sha256_of(frame()[["size", "age"]].to_numpy(), frame()["price"].to_numpy())
    assert kept == {
        "schema": 1,
        "model": "linear_regression",
        "guide": "mean_field_normal",
        "data": str(fitted.table),
        "target": "price",
        "columns": ["size", "age"],
        "holdout": 0.2,
        "seed": 0,
    }
    assert json.loads((fitted.folder / "posterior.json").read_text())["options"]["steps"] == 60


def test_the_same_seed_gives_the_same_posterior_and_another_does_not(fitted, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        assert main(fit_arguments(fitted.table, tmp_path / name, seed=seed)) == 0
    folders = (fitted.folder, tmp_path / "same", tmp_path / "other")
    first, same, other = (tensors_in(folder) for folder in folders)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["losses"], other["losses"])


@pytest.mark.parametrize(
    ("name", "read"),
    [("p.csv", pd.read_csv), ("p.parquet", pd.read_parquet), ("p.npz", lambda path: pd.DataFrame(dict(np.load(path))))],
)
def test_predict_writes_mean_spread_and_interval_of_each_row(fitted, tmp_path, capsys, name, read):
    out = tmp_path / "new" / name
    predict(fitted.folder, fitted.table, out)
    assert capsys.readouterr().out == f"{out}\n"
    assert names_in(out.parent) == [name]
    found = read(out)
    expected = Run.read(fitted.folder).posterior(fitted.folder).predict(frame()[["size", "age"]].to_numpy(), draws=200)
    assert list(found) == COLUMNS
    np.testing.assert_allclose(found["mean"], expected.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["std"], expected.std, rtol=1e-5)
    np.testing.assert_allclose(found[["lower", "upper"]].T, torch.stack(expected.interval(0.9)), rtol=1e-5, atol=1e-6)
    assert (found["lower"] < found["mean"]).all()
    assert (found["mean"] < found["upper"]).all()


def test_predict_takes_columns_by_name_in_any_order_and_format(fitted, tmp_path):
    table = frame()
    table[["age", "size"]].to_parquet(tmp_path / "new.parquet", index=False)
    np.savez(tmp_path / "new.npz", x=table[["size", "age"]].to_numpy())
    first = predict(fitted.folder, fitted.table, tmp_path / "a.csv")
    for name in ("new.parquet", "new.npz"):
        pd.testing.assert_frame_equal(predict(fitted.folder, tmp_path / name, tmp_path / "b.csv"), first)


def test_a_smaller_share_gives_narrower_intervals_round_the_same_mean(fitted, tmp_path):
    wide = predict(fitted.folder, fitted.table, tmp_path / "a.csv", prob=0.9)
    narrow = predict(fitted.folder, fitted.table, tmp_path / "b.csv", prob=0.5)
    assert (narrow["mean"] == wide["mean"]).all()
    assert (narrow["lower"] > wide["lower"]).all()
    assert (narrow["upper"] < wide["upper"]).all()


def test_predict_writes_all_draws_batch_by_batch(fitted, tmp_path, capsys):
    x = frame()[["size", "age"]].to_numpy()
    np.save(tmp_path / "x.npy", x)
    predict(fitted.folder, fitted.table, tmp_path / "p.zarr", **{"batch-size": 7})
    predict(fitted.folder, tmp_path / "x.npy", tmp_path / "q.zarr", **{"batch-size": 9, "keep": "summary", "prob": 0.8})
    expected = Run.read(fitted.folder).posterior(fitted.folder).predict(x, draws=200)
    found, short = (open_prediction(tmp_path / name) for name in ("p.zarr", "q.zarr"))
    np.testing.assert_allclose(found.draws.values, expected.draws.numpy(), rtol=1e-5)
    np.testing.assert_allclose(short.std.numpy(), expected.std.numpy(), rtol=1e-5)
    assert short.interval(0.8).lower.shape == (40,)
    capsys.readouterr()
    words = ["predict", fitted.folder, "--data", fitted.table, "--out", tmp_path / "p.zarr", "--draws", 200]
    assert "pass resume=True (or --resume)" in refused(capsys, words)
    assert "batch_size is 7 there and None here" in refused(capsys, [*words, "--resume"])
    assert main([*map(str, words), "--batch-size", "7", "--resume"]) == 0
    assert len(predict(fitted.folder, tmp_path / "x.npy", tmp_path / "p.csv")) == 40


def test_an_interrupted_prediction_says_how_to_go_on(fitted, tmp_path, capsys, monkeypatch):
    def interrupted(store, number, fields):
        raise KeyboardInterrupt

    monkeypatch.setattr(PredictionStore, "write", interrupted)
    words = ["predict", fitted.folder, "--data", fitted.table, "--out", tmp_path / "p.zarr"]
    assert main([*map(str, words)]) == 130
    assert capsys.readouterr().err.endswith("the same command with --resume goes on with it\n")


def test_predict_replaces_an_older_file(fitted, tmp_path):
    (tmp_path / "p.csv").write_text("old")
    assert len(predict(fitted.folder, fitted.table, tmp_path / "p.csv")) == 40


def without_figures(page):
    return re.sub('base64,[^"]+', "", page)


def test_report_writes_a_lost_report_again(run, capsys):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    after = (run / "report.html").read_text()
    assert "price by linear_regression" in after
    written = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")  # a minute may have passed
    assert written.sub("", without_figures(after)) == written.sub("", without_figures(before))
    assert names_in(run) == RUN_FILES


def test_two_runs_are_compared_by_the_names_of_their_folders(fitted, here, capsys):
    for name in ("first", "second"):
        shutil.copytree(fitted.folder, here / name)
    assert main(["report", "first", "second", "--out", "new/c.html"]) == 0
    assert capsys.readouterr().out == f"{Path('new/c.html')}\n"
    page = (here / "new" / "c.html").read_text()
    assert "2 fits compared" in page
    assert "houses.csv, target price, 32 rows" in page
    assert "different" not in page
    shutil.copytree(fitted.folder, here / "more" / "first")
    assert main(["report", "first", "more/first"]) == 0
    assert "more/first: " in (here / "comparison.html").read_text()
    assert names_in(here / "first") == RUN_FILES


def test_a_run_is_not_compared_with_itself_or_written_over_a_folder(run, capsys):
    assert "given twice" in refused(capsys, ["report", run, run])
    assert "is a folder" in refused(capsys, ["report", run, "--out", run])


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


def test_list_names_every_model_guide_and_data_set(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    groups = {line.removesuffix(":") for line in lines if not line.startswith(" ") and line.endswith(":")}
    assert groups == {"models", "guides", "data"}
    named = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines if line.startswith(" ")}
    assert set(named) == {name for group in groups for name in registry.names(group)}
    assert {"linear_regression", "bnn_regression", "mean_field_normal", "cosine", "mnist", "yacht"} <= set(named)
    assert all(named.values())


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "inference", "list"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "linear_regression" in done.stdout


def test_set_reaches_the_model(here):
    arguments = fit_arguments("houses.csv", "run", "bnn_regression")
    assert main([*arguments, "--set", "hidden=[4]", "--set", "noise=0.5"]) == 0
    options = Run.read(here / "run").options
    assert (options["hidden"], options["noise"], options["weight_prior"]) == ([4], 0.5, "fan-in")
    shapes = {name: tuple(value.shape) for name, value in tensors_in("run").items()}
    locs = {name.rpartition(".")[2]: shape for name, shape in shapes.items() if ".locs." in name}
    assert locs == {"w0": (2, 4), "b0": (4,), "w1": (4, 1), "b1": (1,)}


def test_holdout_0_fits_every_row_and_scores_none(here, capsys):
    assert main(fit_arguments("houses.csv", "run", holdout=0)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "linear_regression on houses.csv: 40 rows to fit, 0 held out",
        "report: run/report.html",
    ]
    assert names_in(here / "run") == RUN_FILES


def test_a_data_set_by_name_needs_no_target(here, capsys):
    assert main(fit_arguments("cosine", "run", target=None)) == 0
    assert capsys.readouterr().out.startswith("linear_regression on cosine: 32 rows to fit, 8 held out\n")
    assert (Run.read(here / "run").data, Run.read(here / "run").target) == ("cosine", "y")


def test_a_model_and_a_guide_of_ones_own(here, capsys, monkeypatch):
    (here / "mymodel.py").write_text(MY_MODULE)
    words = {"model": "mymodel:model", "guide": "mymodel:guide", "steps": 200, "lr": 0.05}
    assert main(fit_arguments("houses.csv", "run", **words)) == 0
    assert "report: run/report.html" in capsys.readouterr().out
    assert Run.read(here / "run", own_code=True).data == str(here / "houses.csv")
    slope = tensors_in("run")["param:loc"].numpy()
    np.testing.assert_allclose(slope, [2, -1], atol=0.5)
    assert main(["report", "run"]) == 0  # it was made here
    capsys.readouterr()
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "elsewhere"))
    (here / "run" / "report.html").unlink()
    for command in (
        ["report", "run"],
        ["diagnose", "run"],
        ["predict", "run", "--data", "houses.csv", "--out", "p.csv"],
    ):
        words = refused(capsys, command)
        assert "run.json was not made here and names 'mymodel:model', code that would be imported and run" in words
    assert main(["report", "run", "--own-code"]) == 0
    assert names_in(here / "run") == RUN_FILES
    assert main(["predict", "run", "--own-code", "--data", "houses.csv", "--out", "p.csv", "--draws", "200"]) == 0
    found = pd.read_csv("p.csv")
    np.testing.assert_allclose(found["mean"], frame()[["size", "age"]].to_numpy() @ slope, atol=0.2)


@pytest.mark.slow
def test_a_network_with_dropout_has_its_usual_guide_and_starts_at_the_seed(here, capsys):
    losses = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        arguments = fit_arguments("houses.csv", name, "dropout_regression", seed=seed)
        assert main([*arguments, "--set", "hidden=8", "--batch-size", "16"]) == 0
        losses.append(tensors_in(name)["param:net$$$2.weight"])
    assert (Run.read(here / "one").guide, losses[0].shape) == ("bernoulli_dropout", (8, 2))
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    found = predict(here / "one", "houses.csv", here / "p.csv", **{"batch-size": 7})
    assert found.shape == (40, 4)


def test_a_classifier_of_images_by_name(here, capsys):
    arguments = fit_arguments("digits", "run", "dropout_cnn", target=None, steps=20)
    assert main([*arguments, "--set", "hidden=20", "--batch-size", "50"]) == 0
    said = capsys.readouterr().out
    assert "share predicted rightly" in said
    assert "calibration error" in said
    assert "Brier score" in said
    assert "Which images is it sure of?" in (here / "run" / "report.html").read_text()


@pytest.mark.parametrize("guide", ["AutoDelta", "AutoMultivariateNormal"])
def test_an_autoguide_class_is_built_for_the_model(here, capsys, guide):
    assert main(fit_arguments("houses.csv", "run", guide=f"pyro.infer.autoguide:{guide}")) == 0
    assert names_in(here / "run") == RUN_FILES
    assert json.loads(Path("run/posterior.json").read_text())["guide"] == guide
    capsys.readouterr()
    assert main(["diagnose", "run"]) == 0
    assert ("the guide is a point estimate" in capsys.readouterr().out) == (guide == "AutoDelta")
    found = predict(here / "run", "houses.csv", here / "p.csv")
    assert (found["lower"] < found["upper"]).all()


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


BAD_PREDICTIONS = {
    "missing columns": ({"data": "short.csv"}, ["short.csv lacks ['age']", "['size', 'age']"]),
    "extra columns": ({"data": "long.csv"}, ["long.csv has ['rooms']", "['size', 'age']"]),
    "text column": ({"data": "text.csv"}, ["text.csv", "'age'", "'old'"]),
    "NPZ with another number of columns": ({"data": "three.npz"}, ["three.npz", "3 columns", "had 2, ['size', 'age']"]),
    "data set with other columns": ({"data": "diabetes"}, ["diabetes has 10 columns", "had 2", "'size', 'age'"]),
    "missing file": ({"data": "lost.csv"}, ["'lost.csv'"]),
    "folder that is not a run": ({"folder": "."}, ["is not a run", "run.json"]),
    "folder that is not there": ({"folder": "lost"}, ["lost is not a run", "run.json"]),
    "file of another kind": ({"out": "new/p.txt"}, ["'.txt'", ".csv", ".parquet", ".npz"]),
    "file without an ending": ({"out": "new/p"}, [".csv", ".parquet", ".npz"]),
    "output under a file": ({"out": "houses.csv/p.csv"}, ["cannot write", "houses.csv", "--out"]),
    "output that is a folder": ({"out": "run/folder.csv"}, ["folder.csv"]),
    "summary of a table": ({"keep": "summary"}, ["--keep", ".zarr", ".csv"]),
    "summary of another kind": ({"keep": "mean", "out": "new/p.zarr"}, ["keep is 'mean'"]),
    "no draws": ({"draws": 0}, ["draws is 0"]),
    "share above 1": ({"prob": 90}, ["prob is 90"]),
}


@pytest.mark.parametrize(("changed", "words"), BAD_PREDICTIONS.values(), ids=BAD_PREDICTIONS)
def test_a_prediction_that_cannot_be_is_refused_in_one_line_and_leaves_nothing(here, run, capsys, changed, words):
    table = frame()
    table[["size", "price"]].to_csv("short.csv", index=False)
    table.assign(rooms=1).to_csv("long.csv", index=False)
    table.assign(age="old").to_csv("text.csv", index=False)
    np.savez("three.npz", x=np.zeros((4, 3)))
    (run / "folder.csv").mkdir()
    options = {"folder": "run", "data": "houses.csv", "out": "new/p.csv", "draws": 20, **changed}
    folder = options.pop("folder")
    said = refused(capsys, ["predict", folder, *(w for name, v in options.items() for w in (f"--{name}", v))])
    assert [word for word in words if word not in said] == []
    left = {path.name for path in here.rglob("*")}
    assert not [name for name in left if name.startswith("p.") or name.endswith(".partial") or name.startswith("tmp")]


@pytest.fixture
def damage(run):
    def apply(name, content):
        (path,) = run.glob(name)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content(path.read_bytes()))
        return run

    return apply


def half(content):
    return content[: len(content) // 2]


DAMAGE = {
    "no run.json": ("run.json", None, ["is not a run", "run.json"]),
    "half of run.json": ("run.json", half, ["run.json is damaged", "from a backup"]),
    "run.json of another program": ("run.json", lambda _: b'{"name": "x"}', ["run.json has schema None"]),
    "run.json that is a list": ("run.json", lambda _: b"[]", ["run.json is damaged", "from a backup"]),
    "binary run.json": ("run.json", lambda _: b"\xff\xfe", ["run.json is damaged", "from a backup"]),
    "run.json of another model": (
        "run.json",
        lambda b: json.dumps({**json.loads(b), "options": {"intercept": False}}).encode(),
        ["run.json is damaged", "checksum"],
    ),
    "no posterior.json": ("posterior.json", None, ["posterior.json"]),
    "half of posterior.json": (
        "posterior.json",
        half,
        ["posterior.json is damaged", "from a backup"],
    ),
    "posterior.json of another version": (
        "posterior.json",
        lambda b: json.dumps({**json.loads(b), "schema": 99}).encode(),
        ["posterior.json has schema 99", "reads 1", "use the version that wrote it"],
    ),
    "no tensors": ("posterior-*.safetensors", None, [".safetensors beside it, which is not there"]),
    "half of the tensors": ("posterior-*.safetensors", half, [".safetensors is damaged", "from a backup"]),
    "empty tensors": ("posterior-*.safetensors", lambda _: b"", [".safetensors is damaged", "from a backup"]),
    "overwritten tensors": (
        "posterior-*.safetensors",
        lambda b: bytes(len(b)),
        [".safetensors is damaged", "checksum", "from a backup"],
    ),
}


@pytest.mark.parametrize("command", ["report", "diagnose", "predict"])
@pytest.mark.parametrize(("name", "content", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_refused_in_one_line(damage, fitted, tmp_path, capsys, command, name, content, words):
    folder = damage(name, content)
    (folder / "report.html").write_text("old report")
    options = ["--data", fitted.table, "--out", tmp_path / "p.csv"] if command == "predict" else []
    said = refused(capsys, [command, folder, *options])
    assert [word for word in words if word not in said] == []
    assert (folder / "report.html").read_text() == "old report"
    assert not (tmp_path / "p.csv").exists()


def test_a_run_of_another_model_is_refused(run, fitted, resealed, capsys):
    resealed(run / "run.json", options={"intercept": False})
    said = refused(capsys, ["diagnose", run])
    assert "does not match this model and guide" in said
    assert "bias" in said


def test_a_run_and_the_posterior_of_another_are_told_apart(run, tmp_path, fitted, capsys):
    assert main(fit_arguments(fitted.table, tmp_path / "other", seed=1)) == 0
    capsys.readouterr()
    shutil.copy(tmp_path / "other" / "run.json", run)
    assert "run.json belongs to another posterior than posterior.json beside it" in refused(capsys, ["diagnose", run])


@pytest.fixture
def use_table(run, resealed):
    def use(table):
        resealed(run / "run.json", data=str(table))
        return table

    return use


@pytest.mark.parametrize("command", ["report", "diagnose"])
def test_changed_data_is_refused(run, use_table, tmp_path, capsys, command):
    changed = frame()
    changed.loc[3, "age"] += 1e-9
    table = use_table(tmp_path / "houses.csv")
    changed.to_csv(table, index=False)
    said = refused(capsys, [command, run])
    assert said == f"{table} has changed since the fit: fit again, or bring the old file back"


@pytest.mark.parametrize("command", ["report", "diagnose"])
def test_lost_data_is_named(run, use_table, tmp_path, capsys, command):
    table = use_table(tmp_path / "lost.csv")
    assert f"there is no file '{table}'" in refused(capsys, [command, run])


def test_predicting_needs_no_data_of_the_fit(run, use_table, fitted, tmp_path):
    use_table(tmp_path / "lost.csv")
    assert len(predict(run, fitted.table, tmp_path / "p.csv")) == 40


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


def test_an_autoencoder_is_fitted_on_rows_alone_scored_and_asked_for_codes(here, capsys):
    """Its target column is kept apart, and colours the map."""
    random = np.random.default_rng(0)
    kind = random.integers(0, 2, 1000)
    x = (random.random((1000, 64)) < np.where(kind[:, None], 0.8, 0.2)).astype(np.float32)
    np.savez(here / "bits.npz", x=x, y=kind)
    arguments = fit_arguments("bits.npz", "run", "vae", target=None, steps=800)
    status = main([*arguments, "--set", "latent=3", "--set", "hidden=[20]"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    lines = printed.out.splitlines()
    assert lines[0] == "vae on bits.npz: 800 rows to fit, 200 held out"
    # The two kinds known, a row costs 64 · H(0.2) = 32.0 nats and ln 2 for its kind; not known, 44.4.
    assert -36 < float(lines[1].split()[3]) <= float(lines[2].split()[6].rstrip("nats")) < -28
    page = Path("run/report.html").read_text()
    for title in ("What do its codes remember?", "What does the model make?", "Where do the codes lie?"):
        assert title in page
    assert main(["diagnose", "run"]) == 0
    codes = predict(Path("run"), "bits.npz", here / "codes.csv")
    assert list(codes.columns) == [*(f"z{i}" for i in range(3)), *(f"z{i}_std" for i in range(3))]
    assert len(codes) == 1000
    assert max(abs(np.corrcoef(codes[f"z{i}"], kind)[0, 1]) for i in range(3)) > 0.8


def test_a_fit_that_finds_its_own_steps_says_why_it_stopped(here, capsys, monkeypatch):
    monkeypatch.setattr("inference.optim.averaged_adam._FIRST", 400)
    monkeypatch.setattr("inference.optim.averaged_adam._SETTLE", 100)
    status = main(fit_arguments("houses.csv", "run", optimizer="auto", steps=600, engine="eager"))
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert re.search("converged after|settled after|ceiling of steps", printed.out)
    assert re.search("converged after|settled after|ceiling of steps", Path("run/report.html").read_text())
