"""Files that ``kiln predict`` writes, and what it refuses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from inference import open_prediction
from inference.cli.commands import main
from inference.cli.runs import Run
from inference.predictive.zarr_store import PredictionStore
from tests.helpers.command_line import COLUMNS, fit_arguments, frame, names_in, predict, refused

pytestmark = pytest.mark.usefixtures("few_draws", "blank_figures")


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


def test_predicting_needs_no_data_of_the_fit(run, use_table, fitted, tmp_path):
    use_table(tmp_path / "lost.csv")
    assert len(predict(run, fitted.table, tmp_path / "p.csv")) == 40


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
