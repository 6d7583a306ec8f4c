import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal

from guides import mean_field_normal
from inference import fit, load
from ppl_models import linear_regression

GROUPS = {
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "observed_data",
    "constant_data",
    "prior",
    "prior_predictive",
    "optimization",
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:arviz", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def posterior(line):
    return fit(
        linear_regression, mean_field_normal(linear_regression), line.x, line.y, steps=600, lr=0.03, progress=False
    )


@pytest.fixture(scope="module")
def inference_data(posterior):
    return posterior.to_arviz(draws=300)


def test_every_group_is_there_with_its_dimensions(inference_data, line):
    assert set(inference_data) == GROUPS
    assert inference_data.posterior["weights"].dims == ("chain", "draw", "weights_dim_0")
    for group in ("posterior_predictive", "log_likelihood", "prior_predictive"):
        assert inference_data[group]["y"].dims == ("chain", "draw", "data")
        assert inference_data[group]["y"].shape == (1, 300, 40)
    np.testing.assert_array_equal(inference_data.observed_data["y"], line.y)
    np.testing.assert_array_equal(inference_data.constant_data["x"], line.x)
    assert inference_data.constant_data["x"].dims == ("data", "x_dim_1")


def test_the_numbers_are_those_of_the_posterior(inference_data, posterior, line):
    np.testing.assert_array_equal(inference_data.posterior["bias"][0], posterior.sample(300)["bias"])
    np.testing.assert_array_equal(inference_data.optimization["loss"], posterior.losses)
    z = {name: draws[7] for name, draws in posterior.sample(300).items()}
    expected = dist.Normal(z["bias"] + line.x @ z["weights"], z["noise"]).log_prob(line.y)
    np.testing.assert_allclose(inference_data.log_likelihood["y"][0, 7], expected, rtol=1e-5)
    # Prior sd of the bias is 1; the sd of 300 draws has a standard error of 4 %.
    assert float(inference_data.prior["bias"].std()) == pytest.approx(1, abs=0.17)


def test_arviz_summarises_plots_and_compares(inference_data):
    first = az.__version__.startswith("0.")
    assert float(az.summary(inference_data, kind="stats").loc["weights[0]", "mean"]) == pytest.approx(2, abs=0.3)
    plot_latents, plot_check = (az.plot_posterior, az.plot_ppc) if first else (az.plot_dist, az.plot_ppc_dist)
    plot_latents(inference_data, var_names=["bias", "noise"])
    plot_check(inference_data, **{"num_pp_samples" if first else "num_samples": 20})
    loo = az.loo(inference_data)
    # 40 rows of noise sd 0.3: the expected log density a row is −log(0.3) − ½ log 2πe = −0.215.
    assert (loo.elpd_loo if first else loo.elpd) / 40 == pytest.approx(-0.215, abs=0.35)


def dataset(group):
    """A group of either generation."""
    return group if isinstance(group, xr.Dataset) else group.to_dataset()


def test_netcdf_keeps_it(inference_data, tmp_path):
    path = tmp_path / "run.nc"
    inference_data.to_netcdf(str(path), engine="h5netcdf")
    again = az.from_netcdf(str(path), engine="h5netcdf")
    assert set(again) == GROUPS
    for group in GROUPS:
        assert dataset(again[group]).identical(dataset(inference_data[group]))
    again.close()


def test_plates_name_the_dimensions_and_never_clash_with_an_argument():
    def model(visit, y=None):
        with pyro.plate("school", 8):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            with pyro.plate("visit", 3):
                mood = pyro.sample("mood", dist.Normal(effect, 1.0))
                pyro.sample("score", dist.Normal(mood + visit, 1.0), obs=y)

    visits = torch.randn(3, 1)
    posterior = fit(model, AutoNormal(model), visits, torch.randn(3, 8), steps=20, progress=False)
    groups = posterior.to_arviz(draws=4)
    assert groups.posterior["effect"].dims == ("chain", "draw", "school")
    assert groups.posterior["mood"].dims == ("chain", "draw", "visit", "school")
    assert groups.observed_data["score"].dims == ("visit", "school")
    np.testing.assert_array_equal(groups.constant_data["visit"], visits)


def test_without_data_there_are_the_groups_that_need_none(posterior, tmp_path):
    posterior.save(tmp_path)
    loaded = load(tmp_path, linear_regression, mean_field_normal(linear_regression))
    assert set(loaded.to_arviz(draws=3)) == {"posterior", "optimization"}


def test_a_slash_in_a_name_is_kept_or_refused_by_name():
    def model(x):
        pyro.sample("rate/day", dist.Normal(0.0, 1.0))

    found = fit(model, AutoNormal(model), torch.zeros(1), steps=20, progress=False)
    if az.__version__.startswith("0."):
        assert found.to_arviz(draws=3).posterior["rate/day"].shape == (1, 3)
    else:
        with pytest.raises(ValueError, match=r"'rate/day'.* have a '/'.*rename"):
            found.to_arviz(draws=3)
