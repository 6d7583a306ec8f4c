"""Models, guides and data by name, and those of one's own."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from inference.cli import registry
from inference.cli.commands import main
from inference.cli.runs import Run
from tests.helpers.command_line import (
    MY_MODULE,
    RUN_FILES,
    fit_arguments,
    frame,
    names_in,
    predict,
    refused,
    tensors_in,
)

pytestmark = pytest.mark.usefixtures("few_draws", "blank_figures")


def test_list_names_every_model_guide_and_data_set(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    groups = {line.removesuffix(":") for line in lines if not line.startswith(" ") and line.endswith(":")}
    assert groups == {"models", "guides", "data"}
    named = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines if line.startswith(" ")}
    assert set(named) == {name for group in groups for name in registry.names(group)}
    assert {"linear_regression", "bnn_regression", "mean_field_normal", "cosine", "mnist", "yacht"} <= set(named)
    assert all(named.values())


def test_set_reaches_the_model(here):
    arguments = fit_arguments("houses.csv", "run", "bnn_regression")
    assert main([*arguments, "--set", "hidden=[4]", "--set", "noise=0.5"]) == 0
    options = Run.read(here / "run").options
    assert (options["hidden"], options["noise"], options["weight_prior"]) == ([4], 0.5, "fan-in")
    shapes = {name: tuple(value.shape) for name, value in tensors_in("run").items()}
    locs = {name.rpartition(".")[2]: shape for name, shape in shapes.items() if ".locs." in name}
    assert locs == {"w0": (2, 4), "b0": (4,), "w1": (4, 1), "b1": (1,)}


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
