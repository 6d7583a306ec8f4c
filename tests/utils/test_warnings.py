"""Warnings name the line of the user's file from which Kiln was called."""

import contextlib
import inspect
import warnings
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides import mean_field_normal
from inference import Checkpoint, fit, fit_many
from inference.storage import checkpoint
from inference.utils.warnings import warn

X = torch.linspace(0.0, 1.0, 8)


def line_of(function, mark):
    """Number of the line of ``function`` that holds ``mark``."""
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if mark in line)


def assert_here(caught, function, mark="# here"):
    assert [(one.filename, one.lineno) for one in caught] == [(__file__, line_of(function, mark))]


def prior_only(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    if y is not None:
        pyro.sample("y", dist.Normal(w * x, 1.0).to_event(1), obs=y)


def branches(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w if w > 0 else -w, 1.0), obs=x.sum())


def test_a_model_that_observes_nothing():
    with pytest.warns(UserWarning, match="observes nothing") as caught:
        fit(prior_only, mean_field_normal(prior_only), X, steps=2, engine="eager", progress=False)  # here
    assert_here(caught, test_a_model_that_observes_nothing)


def test_a_model_that_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr("inference.engine.selection._ALWAYS_EAGER", 1)
    with pytest.warns(UserWarning, match="cannot be compiled") as caught:
        fit(branches, mean_field_normal(branches), X, steps=2, progress=False)  # here
    assert_here(caught, test_a_model_that_cannot_be_compiled)


def test_a_restart_that_fails():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if torch.initial_seed() == 0:
            pyro.factor("bad", torch.log(-z.abs()))

    with pytest.warns(UserWarning, match="start 1 of 2 failed") as caught:
        fit(model, mean_field_normal(model), steps=2, restarts=2, engine="eager", progress=False)  # here
    assert_here(caught, test_a_restart_that_fails)


def test_a_checkpoint_of_other_versions(tmp_path, monkeypatch):
    options = {"steps": 20, "engine": "eager", "progress": False, "checkpoint": Checkpoint(tmp_path)}
    fit(prior_only, mean_field_normal(prior_only), X, X, **options)
    monkeypatch.setattr(checkpoint, "versions", lambda: {"torch": "0.1"})
    with pytest.warns(UserWarning, match="of other versions") as caught:
        fit(prior_only, mean_field_normal(prior_only), X, X, **options, resume=True)  # here
    assert_here(caught, test_a_checkpoint_of_other_versions)


def test_fits_that_cannot_run_together():
    fits = [partial(fit, branches, mean_field_normal(branches), X, steps=2) for _ in range(2)]
    with pytest.warns(UserWarning, match="2 fits run one by one") as caught:
        fit_many(fits, progress=False)  # here
    assert_here(caught, test_fits_that_cannot_run_together)


def test_frames_between_two_of_ours_are_passed_over(monkeypatch):
    """A call that goes through torch and contextlib and our own files ends at this one."""
    ours = {}
    source = (
        "import contextlib\n"
        "from inference.utils.warnings import warn\n"
        "@contextlib.contextmanager\n"
        "def manager():\n"
        "    yield warn('deep down')\n"
        "def hook(*_):\n"
        "    with manager():\n"
        "        pass\n"
    )
    package = inspect.getfile(fit)
    exec(compile(source, package, "exec"), ours)
    module = nn.Linear(1, 1)
    module.register_forward_hook(ours["hook"])
    exec(compile("def call(module, x):\n    module(x)\n", package, "exec"), ours)
    with pytest.warns(UserWarning, match="deep down") as caught:
        ours["call"](module, X[:, None])  # here
    assert_here(caught, test_frames_between_two_of_ours_are_passed_over)


def test_a_line_of_the_user_warns_once_and_can_be_filtered():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("told once")
        warnings.filterwarnings("ignore", module=__name__)
        warn("not told")
    assert [str(one.message) for one in caught] == ["told once"]
    with warnings.catch_warnings(), contextlib.suppress(FutureWarning):
        warnings.simplefilter("error")
        warn("of its category", FutureWarning)
        pytest.fail("no warning")


def test_no_other_module_counts_frames():
    root = Path(__file__).parents[2]
    found = [path for name in ("inference", "guides", "ppl_models") for path in (root / name).rglob("*.py")]
    assert [path for path in found if "warnings.warn(" in path.read_text()] == []
