"""Folders that Kiln 0.1.0 wrote: they load, and what follows from them is what it was then, to rounding."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from guides import mean_field_normal
from inference import calibrate, fit, load, open_prediction
from inference.cli.runs import Run
from ppl_models import linear_regression

SAVED = Path(__file__).parents[1] / "saved" / "by_0_1_0"


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def kept_model():
    return module(SAVED / "kept_model.py").kept_model


@pytest.fixture(scope="module")
def rows():
    table = pd.read_csv(SAVED / "rows.csv")
    return table[["a", "b"]].to_numpy(), table["y"].to_numpy()


@pytest.fixture
def saved(tmp_path):
    """Copy a folder, since a fit that is resumed writes to it."""
    return lambda name: shutil.copytree(SAVED / name, tmp_path / name)


def test_a_posterior(rows):
    posterior = load(SAVED / "posterior", linear_regression, mean_field_normal(linear_regression), *rows)
    expected = [0.4403819739818573, -0.786954402923584]
    assert posterior.params["AutoNormal.locs.weights"].tolist() == pytest.approx(expected)
    assert posterior.losses.shape == (60,)
    assert posterior.predict(rows[0], draws=5).mean.shape == (30,)


def test_a_stored_prediction_and_an_exported_predictor(rows, tmp_path):
    stored = open_prediction(SAVED / "prediction")
    program = shutil.copy(SAVED / "exported" / "predictor.py.txt", tmp_path / "predictor.py")  # data here, no code
    exported = module(program).load(SAVED / "exported" / "predictor.npz")
    assert np.asarray(stored.mean).shape == (30,)
    assert exported.predict(rows[0]).draws.shape == (5, 30)


@pytest.mark.parametrize(
    ("folder", "guide", "options"),
    [
        ("checkpoint", AutoNormal, {"lr": 0.02, "steps": 90}),
        ("checkpoint_automatic", AutoMultivariateNormal, {}),
    ],
)
def test_a_checkpoint_is_resumed_to_the_numbers_of_a_fit_in_one_piece(kept_model, rows, saved, folder, guide, options):
    options = {"engine": "eager", "progress": False, **options}
    resumed = fit(kept_model, guide(kept_model), *rows, checkpoint=saved(folder), resume=True, **options)
    straight = fit(kept_model, guide(kept_model), *rows, **options)
    assert len(resumed.losses) == len(straight.losses)
    for name, value in straight.params.items():
        torch.testing.assert_close(resumed.params[name], value, rtol=1e-4, atol=1e-5)


def test_a_calibration_goes_on(kept_model, rows, saved):
    folder = saved("calibration")
    kept = {path.name: path.read_bytes() for path in folder.glob("fit_*.json")}
    found = calibrate(kept_model, mean_field_normal, *rows, fits=4, draws=9, steps=30, path=folder, progress=False)
    assert 4 in found.ranks.shape
    assert all((folder / name).read_bytes() == content for name, content in kept.items())


def test_a_run():
    run = Run.read(SAVED / "finished_run")
    assert run.model == "linear_regression"
