"""One clear error each: what is wrong, what was found, what to do; and nothing left behind."""

from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from guides import mean_field_normal
from inference import fit, load
from ppl_models import bnn_regression, linear_regression

X, Y = np.linspace(-1, 1, 20)[:, None], np.linspace(0, 1, 20)


def attempt(x=X, y=Y, model=linear_regression, guide=None, **options):
    return fit(model, guide or mean_field_normal(model), x, y, progress=False, **{"steps": 20, **options})


def with_value(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": with_value(X, (3, 0), np.nan)}, r"x has 1 values.*nan at row 3, column 0.*remove or impute"),
        ({"y": with_value(Y, 5, np.inf)}, r"y has 1 values.*inf at row 5"),
        ({"y": Y[:-1]}, r"x has 20 rows but y has 19"),
        ({"x": X[:0], "y": Y[:0]}, r"x is empty \(shape \(0, 1\)\)"),
        ({"x": np.full((20, 1), "a")}, r"x has dtype <U1, found 'a': convert it to numbers"),
        ({"x": np.full((20, 1), None)}, r"x has dtype object"),
        ({"x": X.astype(complex)}, r"x is complex"),
        ({"steps": 0}, r"steps is 0: pass a whole number"),
        ({"steps": 1.5}, r"steps is 1.5"),
        ({"steps": True}, r"steps is True"),
        ({"lr": 0}, r"lr is 0: pass a number above 0"),
        ({"lr": float("nan")}, r"lr is nan"),
        ({"lr": "fast"}, r"lr is 'fast'"),
        ({"seed": -1}, r"seed is -1: pass a whole number from 0"),
        ({"seed": 0.5}, r"seed is 0.5"),
        ({"particles": 0}, r"particles is 0"),
        ({"batch_size": -3}, r"batch_size is -3"),
        ({"device": "cuda:99"}, r"device 'cuda:99' is not on this machine, which has \['cpu'"),
        ({"device": "toaster"}, r"device 'toaster' is not on this machine"),
        ({"dtype": torch.int64}, r"dtype is torch.int64: pass torch.float32 or torch.float64"),
        ({"engine": "warp"}, r"engine is 'warp': pass 'auto', 'eager' or 'compiled'"),
        ({"optimizer": "lbfgs"}, r"optimizer is 'lbfgs': pass one of \['adam'"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else None,
)
def test_fit_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        attempt(**arguments)
    assert len(pyro.get_param_store()) == 0


def test_a_guide_with_other_sites_is_refused_by_name():
    def guide(x, y=None):
        pyro.sample("weights", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("slope", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"model samples \['bias', 'noise'\].*guide samples \['slope'\]"):
        attempt(guide=guide)


def test_a_model_that_fails_is_named_with_the_shapes():
    def broken(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(7), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"model 'broken' could not run on data of shapes \(20, 1\), \(20,\)"):
        attempt(model=broken)


def test_data_outside_the_support_names_the_site():
    def model(x, y=None):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("count", dist.Exponential(rate), obs=y)

    with pytest.raises(ValueError, match="'count'"):
        attempt(model=model, y=Y - 5)


def test_a_loss_that_explodes_names_the_step_and_the_site():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        planted = torch.where(w > 0.5, torch.full_like(w, torch.nan), w)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(planted * x[:, 0], 1.0), obs=y)

    def guide(x, y=None):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(-1.0)), 0.01))

    with pytest.raises(ValueError, match=r"site 'y' in the model has a log density of nan at step \d+") as caught:
        attempt(model=model, guide=guide, y=X[:, 0] * 3, lr=0.1, steps=200)
    step = int(str(caught.value).split("at step ")[1].split(":")[0])
    # Adam moves by about lr a step, from −1 to 0.5.
    assert 10 <= step <= 25


@pytest.mark.parametrize("width", [2, 3])
def test_prediction_wants_the_columns_of_the_fit(width):
    posterior = attempt()
    with pytest.raises(ValueError, match=rf"x has shape \(4, {width}\) but the fit saw \(20, 1\)"):
        posterior.predict(np.zeros((4, width)))


def test_prediction_refuses_nan_and_no_draws():
    posterior = attempt()
    with pytest.raises(ValueError, match="NaN or infinite"):
        posterior.predict(np.full((2, 1), np.nan))
    with pytest.raises(ValueError, match="draws is 0"):
        posterior.predict(X, draws=0)
    with pytest.raises(ValueError, match="the fit was given 2 arguments, this call 3"):
        posterior.predict(X, Y, Y)


@pytest.mark.parametrize("options", [{"noise": -1}, {"noise": "loud"}, {"weight_prior": "wide"}])
def test_models_name_their_options(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} is {next(iter(options.values()))!r}"):
        attempt(model=partial(bnn_regression, **options))


@pytest.mark.parametrize("scale", [0, -1.0, "wide", True])
def test_the_guide_names_its_scale(scale):
    with pytest.raises(ValueError, match="init_scale is"):
        mean_field_normal(linear_regression, init_scale=scale)


def test_load_says_what_does_not_fit(tmp_path):
    posterior = attempt()
    posterior.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a saved posterior"):
        load(tmp_path / "gone", linear_regression, mean_field_normal(linear_regression))
    with pytest.raises(ValueError, match=r"does not match this model and guide in .*'AutoNormal.locs.b0'"):
        load(tmp_path, bnn_regression, AutoNormal(bnn_regression))
    loaded = load(tmp_path, linear_regression, mean_field_normal(linear_regression))
    with pytest.raises(ValueError, match=r"loaded without its data: pass it, load\(path, model, guide, x, y\)"):
        loaded.diagnose()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("posterior.json", b"{", "damaged"),
        ("posterior.json", b"[]", r"damaged \(it is a list"),
        ("posterior.json", b'{"schema": 1}', "damaged"),
        ("posterior-*.safetensors", b"garbage", "damaged: it has 7 bytes, not the [0-9]+ that were written"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    attempt().save(tmp_path)
    (path,) = tmp_path.glob(name)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is {message}"):
        load(tmp_path, linear_regression, mean_field_normal(linear_regression))


def test_another_schema_is_refused(tmp_path):
    attempt().save(tmp_path)
    path = tmp_path / "posterior.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ValueError, match="schema 99, and this version of kiln-ppl reads 1"):
        load(tmp_path, linear_regression, mean_field_normal(linear_regression))


@pytest.mark.parametrize(
    "x",
    [
        X.astype(np.float32),
        X[::-1],
        np.asfortranarray(np.hstack([X, X])),
        X.astype(">f8"),
        pd.DataFrame({"a": X[:, 0]}),
        torch.tensor(X, dtype=torch.float64, requires_grad=True),
        (X > 0).astype(np.float16),
        X.tolist(),
    ],
    ids=["float32", "negative strides", "Fortran", "big-endian", "frame", "needs grad", "float16", "list"],
)
def test_every_ordinary_array_is_taken(x):
    assert np.isfinite(attempt(x=x).losses).all()


def test_a_network_on_another_device_is_told_where_to_go():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, x, y=None):
            raise AssertionError("it must not come to this")

    with pytest.raises(
        ValueError, match=r"parameters of the model are on meta, but device is cpu: use model.to\('cpu'\)"
    ):
        fit(Model(), lambda x, y=None: None, X, Y, device="cpu", progress=False)
