"""A fitted run, copies of it, and a folder to work in."""

import io
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from inference.cli.commands import main
from tests.helpers.command_line import fit_arguments, frame


@pytest.fixture(autouse=True)
def errors_in_one_line(monkeypatch):
    monkeypatch.delenv("KILN_TRACEBACK", raising=False)


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


@pytest.fixture
def use_table(run, resealed):
    def use(table):
        resealed(run / "run.json", data=str(table))
        return table

    return use
