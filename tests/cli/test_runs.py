"""Run folders: what a fit leaves, its reports, and that damaged or changed ones are refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from inference.cli.commands import main
from inference.cli.runs import Run
from inference.data.arguments import sha256_of
from tests.helpers.command_line import RUN_FILES, fit_arguments, frame, names_in, refused

pytestmark = pytest.mark.usefixtures("few_draws", "blank_figures")


def test_fit_writes_the_run_and_nothing_else(fitted):
    assert fitted.status == 0
    assert names_in(fitted.folder) == RUN_FILES


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
