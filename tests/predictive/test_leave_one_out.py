import re
from functools import partial

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

from guides import bernoulli_dropout, full_rank_normal, mean_field_normal
from inference import fit
from inference.diagnostics.importance_sampling import khat_threshold, leave_one_out, smoothed_weights
from inference.predictive.importance_weights import weighted_draws
from inference.utils.arviz_compat import psis
from ppl_models import DropoutNetwork, exact_linear_regression, linear_regression

NOISE = 0.5
ROWS = 25
SHORT = {"steps": 10, "lr": 1e-6, "engine": "eager", "progress": False}
MODEL = partial(linear_regression, noise=NOISE)


@pytest.fixture(scope="module")
def rows():
    """Rows of two columns that go together, so that the weights are correlated, and one row far off."""
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(ROWS, generator=rng)
    x = torch.stack([first, first + 0.8 * torch.randn(ROWS, generator=rng)], 1)
    y = x @ torch.tensor([1.0, -1.0]) + NOISE * torch.randn(ROWS, generator=rng)
    y[0] += 3 * NOISE
    return x, y


@pytest.fixture(scope="module")
def exact(rows):
    return exact_linear_regression(*rows, noise=NOISE)


@pytest.fixture(scope="module")
def truth(rows):
    """Log p(yᵢ | y₋ᵢ) = log p(y) − log p(y₋ᵢ) in closed form, (N,)."""
    x, y = rows
    whole = exact_linear_regression(x, y, noise=NOISE).log_evidence
    kept = [[j for j in range(ROWS) if j != i] for i in range(ROWS)]
    return np.array([whole - exact_linear_regression(x[k], y[k], noise=NOISE).log_evidence for k in kept])


def shifted(exact, by, wider):
    """The exact posterior, moved by so many of its standard deviations, and wider by this factor."""
    scale = torch.linalg.cholesky(exact.covariance).float() * wider
    mean = (exact.mean + by * exact.covariance.diagonal().sqrt()).float()

    def guide(x, y=None):
        z = pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=scale), infer={"is_auxiliary": True})
        pyro.sample("weights", dist.Delta(z[:2], event_dim=1))
        pyro.sample("bias", dist.Delta(z[2]))

    return guide


def plain(posterior, draws, seed=0):
    """Leave-one-out as if q were the posterior: weights 1/p(yᵢ | z)."""
    likelihood = posterior.log_likelihood(draws=draws, seed=seed)["y"].double().numpy()
    return leave_one_out("y", np.zeros(draws), [likelihood]).elpd


def test_full_rank_is_as_leaving_each_row_out(rows, truth):
    loo = fit(MODEL, full_rank_normal(MODEL), *rows, **{**SHORT, "steps": 1500, "lr": 0.02}).loo()
    assert loo.elpd == pytest.approx(truth.sum(), abs=4 * loo.mcse)
    assert loo.mcse < 0.2
    assert loo.se == pytest.approx((ROWS * truth.var(ddof=1)) ** 0.5, rel=0.05)
    np.testing.assert_allclose(loo.pointwise, truth, atol=0.15)
    assert loo.khat < 0.5
    assert loo.doubtful == ()


def test_a_shifted_guide_is_corrected_and_the_plain_one_is_not(rows, exact, truth):
    posterior = fit(MODEL, shifted(exact, by=0.7, wider=1.3), *rows, **SHORT)
    loo = posterior.loo(draws=20_000)
    assert loo.elpd == pytest.approx(truth.sum(), abs=4 * loo.mcse)
    assert loo.mcse < 0.1
    assert abs(plain(posterior, 20_000) - truth.sum()) > 8 * loo.mcse


def test_the_monte_carlo_error_is_that_of_repeats(rows, exact):
    posterior = fit(MODEL, shifted(exact, by=0.3, wider=1.2), *rows, **SHORT)
    found = [posterior.loo(draws=1000, seed=seed) for seed in range(40)]
    # The sd of 40 repeats has a relative standard error of 1/√78 = 0.11; half of the error's own tail is smoothed away.
    assert np.std([loo.elpd for loo in found]) == pytest.approx(np.mean([loo.mcse for loo in found]), rel=0.45)


def test_p_loo_is_the_number_of_parameters_where_data_are_many_and_the_model_right():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(400, 2, generator=rng)
    y = x @ torch.tensor([1.0, -1.0]) + NOISE * torch.randn(400, generator=rng)
    posterior = fit(MODEL, exact_linear_regression(x, y, noise=NOISE).guide, x, y, **SHORT)
    loo = posterior.loo(draws=2000)
    # Its standard error is that of the mean of 400 squared standard Normals, √(2/400), times three parameters.
    assert loo.p_loo == pytest.approx(3, abs=4 * 3 * (2 / 400) ** 0.5)


def test_a_guide_that_is_the_posterior_has_no_tail_and_is_trusted(rows, exact):
    posterior = fit(MODEL, exact.guide, *rows, **SHORT)
    assert posterior.loo(draws=1000).khat == 0
    assert posterior.sample(50, corrected=True)["bias"].shape == (50,)


def test_where_the_weights_are_bad_it_refuses(rows, exact):
    posterior = fit(MODEL, shifted(exact, by=0.0, wider=0.3), *rows, **SHORT)
    for call in (posterior.loo, partial(posterior.to_arviz, corrected=True)):
        with pytest.raises(ValueError, match=r"Pareto k-hat of .* is .*correct nothing from 0.70 on: try a guide"):
            call()
    attributes = posterior.to_arviz(draws=1000)["posterior"].attrs  # the plain export says so
    assert attributes["pareto_khat"] > attributes["pareto_khat_threshold"]


def test_guides_without_weights_are_refused_with_the_reason(rows):
    x, y = rows
    with pytest.raises(ValueError, match="point estimate"):
        fit(MODEL, AutoDelta(MODEL), x, y, **SHORT).loo()
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 1))
    model = DropoutNetwork(net, noise=0.1)
    with pytest.raises(ValueError, match=r"posterior.evaluate\(x, y\)"):
        fit(model, bernoulli_dropout(model), x, y, **SHORT).loo()


@pytest.mark.parametrize(
    "how", [poutine.scale(scale=0.5), poutine.mask(mask=torch.arange(ROWS) > 3)], ids=["scale", "mask"]
)
def test_a_site_that_is_scaled_or_masked_is_refused(how, rows):
    model = how(lambda x, y=None: MODEL(x, y))
    with pytest.raises(ValueError, match="'y' is scaled or masked"):
        fit(model, mean_field_normal(model), *rows, **SHORT).loo()


def test_rows_that_cannot_be_judged_are_named():
    log_weights = np.random.default_rng(0).normal(size=1000) * 0.1
    likelihood = np.random.default_rng(1).normal(size=(1000, 12)) * 0.1
    likelihood[:, 7] = 9 * np.random.default_rng(2).normal(size=1000)
    likelihood[3, 2] = -np.inf  # a draw under which the observation is impossible: its weight without it is unknown
    loo = leave_one_out("y", log_weights, [likelihood])
    assert loo.doubtful == ((2,), (7,))
    assert re.search(r"2 of 12 have a Pareto k of 0.67 or more, \[2\], \[7\]: ", str(loo))
    assert "every Pareto k is below 0.67" in str(leave_one_out("y", log_weights, [likelihood[:, 8:]]))


def test_counts_of_several_sites_and_batches():
    def model(x, a=None, b=None):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Poisson(rate).expand([len(x)]), obs=a)
            pyro.sample("b", dist.Normal(rate, x[:, 0]).expand([len(x)]), obs=b)

    x = torch.ones(9, 1)
    options = {"steps": 400, "lr": 0.03, "engine": "eager", "progress": False}
    posterior = fit(model, AutoNormal(model), x, torch.arange(9.0), torch.ones(9), **options)
    with pytest.raises(ValueError, match="pass site="):
        posterior.loo()
    with pytest.raises(ValueError, match="site is 'c': pass 'a' or 'b'"):
        posterior.loo(site="c")
    whole, parts = posterior.loo(site="a", draws=500), posterior.loo(site="a", draws=500, batch_size=4)
    assert whole.pointwise.shape == whole.pareto_k.shape == (9,)
    np.testing.assert_allclose(whole.pointwise, parts.pointwise, rtol=1e-5)
    assert whole.mcse == pytest.approx(parts.mcse)


def test_vectors_are_left_out_whole_and_arrays_by_the_number():
    def vectors(x, y=None):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0).expand([len(x), 3]).to_event(1), obs=y)

    def arrays(x, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x), dim=-2), pyro.plate("column", 3, dim=-1):
            pyro.sample("y", dist.Normal(loc, 1.0).expand([len(x), 3]), obs=y)

    x, y = torch.ones(6, 1), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for model, shape in ((vectors, (6,)), (arrays, (6, 3))):
        posterior = fit(model, AutoNormal(model), x, y, steps=300, lr=0.05, engine="eager", progress=False)
        assert posterior.loo(draws=1000).pointwise.shape == shape


def test_corrected_draws_serve_all_groups_and_arvizs_own_leave_one_out(rows, exact, truth):
    posterior = fit(MODEL, shifted(exact, by=0.7, wider=1.3), *rows, **SHORT)
    data = posterior.to_arviz(draws=4000, corrected=True)
    assert data["posterior"].attrs["draws_of"] == "q, picked by importance weights"
    np.testing.assert_array_equal(data["posterior"]["bias"][0], posterior.sample(4000, corrected=True)["bias"])
    z = {name: data["posterior"][name].values[0, :5] for name in ("weights", "bias")}
    mean = torch.as_tensor(z["bias"][:, None] + z["weights"] @ rows[0].numpy().T)
    expected = dist.Normal(mean, NOISE).log_prob(rows[1])
    np.testing.assert_allclose(data["log_likelihood"]["y"][0, :5], expected, rtol=1e-4, atol=1e-5)
    error = posterior.loo(draws=4000).mcse
    assert elpd(az.loo(data)) == pytest.approx(truth.sum(), abs=6 * error)
    assert abs(elpd(az.loo(posterior.to_arviz(draws=4000))) - truth.sum()) > 6 * error


def elpd(found):
    return found.elpd_loo if az.__version__.startswith("0.") else found.elpd


def test_arviz_1_has_the_same(rows, exact):
    if not hasattr(az, "loo_approximate_posterior"):
        pytest.skip("ArviZ 0.x does not have it")
    posterior = fit(MODEL, shifted(exact, by=0.3, wider=1.2), *rows, **SHORT)
    drawn, log_weights = weighted_draws(posterior, 2000, 0)
    likelihood = posterior.log_likelihood(draws=drawn)["y"]
    data = az.from_dict({"log_likelihood": {"y": likelihood[None].numpy()}})
    theirs = az.loo_approximate_posterior(data, log_weights.double().numpy(), np.zeros(2000), pointwise=True)
    ours = posterior.loo(draws=2000)
    np.testing.assert_allclose(ours.pointwise, theirs.elpd_i, rtol=1e-4)
    np.testing.assert_allclose(ours.pareto_k, theirs.pareto_k, atol=1e-3)
    assert ours.se == pytest.approx(theirs.se, rel=1e-4)


def test_weights_without_a_tail():
    even, few = np.full(1000, -100.0), np.arange(7.0)
    assert smoothed_weights(even).khat == 0
    assert smoothed_weights(even).ess == pytest.approx(1000)
    assert smoothed_weights(few).khat == np.inf
    log, khat = psis(np.stack([even, np.random.default_rng(0).normal(size=1000)]))
    np.testing.assert_allclose(np.exp(log).sum(1), 1)
    assert khat[0] == 0 < khat[1] < 0.5
    assert smoothed_weights(np.zeros(1)).khat == 0 > khat_threshold(1)


def test_given_draws_are_taken_as_they_are(rows, exact):
    posterior = fit(MODEL, exact.guide, *rows, **SHORT)
    drawn = posterior.sample(200, corrected=True)
    new = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    expected = drawn["bias"][:, None] + drawn["weights"] @ new.T
    torch.testing.assert_close(posterior.predict(new, draws=drawn).draws, expected)
    torch.testing.assert_close(posterior.predict(new, draws=drawn, batch_size=1).draws, expected)
    # The noise is not made of the numbers that the draws were made of: 2,000 pairs, |r| < 4/√2000.
    many = posterior.sample(2000)
    noise = posterior.predict(new, draws=many, seed=0)
    both = np.corrcoef(np.stack([many["bias"], *(noise.samples - noise.draws).T.numpy()]))
    assert np.abs(both[0, 1:]).max() < 4 / 2000**0.5
    with pytest.raises(ValueError, match=r"missing \['weights'\]"):
        posterior.predict(new, draws={"bias": drawn["bias"]})
    with pytest.raises(ValueError, match="leading dimensions"):
        posterior.predict(new, draws={name: value[0] for name, value in drawn.items()})
    with pytest.raises(ValueError, match="give draws= as a number"):
        posterior.predict(new, draws=drawn, per_row=True)
