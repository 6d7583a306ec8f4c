"""The models are the densities that their docstrings say."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from inference.cli import main
from ppl_models import Scaling, bnn_regression, linear_regression
from ppl_models.bnn_regression import suggested_options

X = torch.linspace(-2, 3, 30).reshape(-1, 3)
Y = torch.linspace(10, 40, 10)


def trace_of(model, *args, seed=0):
    with pyro.poutine.trace() as recorder:
        torch.manual_seed(seed)
        model(*args)
    recorder.trace.compute_log_prob()
    return recorder.trace


def latents(trace):
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def test_edwards_network_has_141_latents():
    values = latents(trace_of(bnn_regression, X[:, :1], Y))
    values.pop("data")
    assert list(values) == ["w0", "b0", "w1", "b1", "w2", "b2"]
    assert sum(value.numel() for value in values.values()) == 141


def test_the_network_is_the_tanh_network_of_its_weights():
    trace = trace_of(partial(bnn_regression, hidden=(4, 5), noise=0.3), X, Y)
    z = latents(trace)
    mean = torch.tanh(torch.tanh(X @ z["w0"] + z["b0"]) @ z["w1"] + z["b1"]) @ z["w2"] + z["b2"]
    torch.testing.assert_close(trace.nodes["y"]["fn"].mean, mean[:, 0])
    torch.testing.assert_close(trace.nodes["y"]["fn"].stddev, torch.full((10,), 0.3))


@pytest.mark.parametrize(("prior", "variances"), [("unit", [1, 1, 1]), ("fan-in", [1 / 3, 1 / 8, 1 / 6])])
def test_the_prior_variance_of_the_weights(prior, variances):
    trace = trace_of(partial(bnn_regression, hidden=(8, 6), weight_prior=prior), X, Y)
    for i, variance in enumerate(variances):
        torch.testing.assert_close(trace.nodes[f"w{i}"]["fn"].variance.max().item(), float(variance))
        assert trace.nodes[f"b{i}"]["fn"].variance.max() == 1


def test_heteroscedastic_noise_is_the_second_output():
    trace = trace_of(partial(bnn_regression, hidden=(4,), noise="heteroscedastic"), X, Y)
    z = latents(trace)
    assert "noise" not in z
    outputs = torch.tanh(X @ z["w0"] + z["b0"]) @ z["w1"] + z["b1"]
    torch.testing.assert_close(trace.nodes["y"]["fn"].mean, outputs[:, 0])
    torch.testing.assert_close(trace.nodes["y"]["fn"].stddev, torch.log1p(outputs[:, 1].exp()) + 1e-6)


@pytest.mark.parametrize("model", [bnn_regression, linear_regression])
def test_scaling_changes_the_units_and_nothing_else(model):
    units = Scaling.of(X.numpy(), Y.numpy())
    scaled = trace_of(partial(model, noise="learned", scaling=units), X, Y)
    z = latents(scaled)
    standard_x, standard_y = units.inputs(X), (Y - units.y_loc) / units.y_scale
    assert abs(standard_x.mean(0)).max() < 1e-5
    plain = poutine.condition(
        partial(model, noise="learned"), data={**z, "noise": z["noise"] / units.y_scale, "data": z["data"]}
    )
    expected = trace_of(plain, standard_x, standard_y).nodes["y"]["log_prob"] - math.log(units.y_scale)
    torch.testing.assert_close(scaled.nodes["y"]["log_prob"], expected, rtol=1e-4, atol=1e-4)


def test_a_scaling_survives_json_and_constant_columns():
    units = Scaling.of(np.array([[1.0, 7.0], [3.0, 7.0]]), np.array([2.0, 2.0]))
    assert units == Scaling((2.0, 7.0), (1.0, 1.0), 2.0, 1.0)
    assert Scaling.read(units.as_dict()).inputs(torch.tensor([[3.0, 7.0]])).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("rows", "inputs", "units"), [(354, 10, 5), (927, 8, 11), (100_000, 3, 50)])
def test_the_suggested_network_grows_with_the_rows_a_weight(rows, inputs, units):
    options = suggested_options(np.zeros((rows, inputs)), np.arange(rows))
    assert options["hidden"] == [units]


@pytest.mark.slow
def test_the_first_command_of_the_readme_is_no_worse_than_least_squares(tmp_path, capsys):
    assert main(["fit", "bnn_regression", "--data", "diabetes", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    rmse, least_squares = (float(line.split()[-1]) for line in said[1:3])
    assert rmse <= least_squares
