import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from guides import mean_field_normal
from inference import ClassPrediction, fit
from inference.predictive.prediction import Prediction
from inference.predictive.scoring import class_scores, log_predictive_density, scores
from ppl_models import linear_regression


@pytest.fixture(scope="module")
def posterior(line):
    return fit(
        linear_regression, mean_field_normal(linear_regression), line.x, line.y, steps=800, lr=0.03, progress=False
    )


def test_one_draw_of_the_weights_makes_one_function_of_all_rows(posterior):
    x = torch.linspace(-3, 3, 50).reshape(-1, 1)
    draws = posterior.predict(x, draws=20, seed=4).draws
    weights = posterior.sample(20, seed=4)
    torch.testing.assert_close(draws, weights["bias"][:, None] + weights["weights"] @ x.T)
    # A fresh draw a row would leave the second difference of a line at the size of the noise.
    assert (draws[:, 2:] - 2 * draws[:, 1:-1] + draws[:, :-2]).abs().max() < 1e-4


def test_rows_do_not_change_each_others_functions(posterior):
    x = torch.linspace(-3, 3, 50).reshape(-1, 1)
    whole = posterior.predict(x, draws=10).draws
    torch.testing.assert_close(posterior.predict(x[:7], draws=10).draws, whole[:, :7])


def test_variance_is_that_of_functions_and_noise(posterior):
    p = posterior.predict(torch.tensor([[0.0], [5.0]]), draws=4000)
    noise = posterior.sample(4000)["noise"].square().mean()
    torch.testing.assert_close(p.noise, noise.expand(2))
    torch.testing.assert_close(p.variance, p.draws.var(0, correction=0) + noise)
    # The sample variance of 4,000 draws has a relative standard error of √(2/4000) = 2.2 %.
    torch.testing.assert_close(p.samples.var(0), p.variance, rtol=0.1, atol=0)
    assert p.epistemic[1] > 4 * p.epistemic[0]
    torch.testing.assert_close(p.std.square(), p.variance)


def test_the_interval_holds_its_share(posterior):
    p = posterior.predict(torch.zeros(1, 1), draws=8000)
    lower, upper = p.interval(0.8)
    exact = 1.2816 * p.std
    # A quantile at 10 % of 8,000 draws has a standard error of 0.019 sd.
    torch.testing.assert_close(upper - p.mean, exact, rtol=0.08, atol=0)
    torch.testing.assert_close(p.mean - lower, exact, rtol=0.08, atol=0)
    narrow = p.interval(0.8, of="functions")
    assert narrow.upper - narrow.lower < 0.6 * (upper - lower)


@pytest.mark.parametrize("prob", [0, 1, -0.5, 90])
def test_an_interval_needs_a_share(posterior, prob):
    with pytest.raises(ValueError, match="between 0 and 1"):
        posterior.predict(torch.zeros(1, 1), draws=5).interval(prob)


def test_a_model_without_a_default_for_y_predicts_too(line):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    posterior = fit(model, AutoNormal(model), line.x, line.y, steps=50, progress=False)
    assert posterior.predict(line.x[:3], draws=6).samples.shape == (6, 3)


def classes(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 3.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("label", dist.Categorical(logits=x @ w), obs=y)


def test_classification_gives_probabilities_and_their_uncertainty():
    x = torch.linspace(-2, 2, 60).reshape(-1, 1)
    y = (x[:, 0] > 0).long() * 2
    posterior = fit(classes, AutoNormal(classes), x, y, steps=600, lr=0.05, progress=False)
    p = posterior.predict(x, draws=100)
    assert isinstance(p, ClassPrediction)
    assert p.draws.shape == (100, 60, 3)
    torch.testing.assert_close(p.probs.sum(-1), torch.ones(60))
    assert (p.labels == y).float().mean() > 0.9
    assert (p.mutual_information <= p.entropy + 1e-6).all()
    assert p.entropy.max() <= math.log(3)
    assert p.entropy[30] > 5 * p.entropy[0]
    found = class_scores(p, y)
    assert found.accuracy > 0.9
    assert -1 < found.log_likelihood < 0


def test_a_binary_observation_is_a_class_of_two():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=w * x), obs=y)

    x = torch.linspace(-2, 2, 30)
    p = fit(model, AutoNormal(model), x, (x > 0).float(), steps=50, progress=False).predict(x, draws=9)
    assert p.probs.shape == (30, 2)


def local(x, y=None):
    """A latent of its own for every row."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.1))
        pyro.sample("y", dist.Normal(z, 0.1), obs=y)


@pytest.fixture(scope="module")
def of_rows():
    return fit(local, AutoNormal(local), torch.zeros(30), torch.linspace(2, 4, 30), steps=1500, lr=0.03, progress=False)


def test_latents_of_rows_are_drawn_from_the_model_at_new_rows(of_rows):
    seen = of_rows.predict_data(draws=200).mean
    assert (seen[-1] - seen[0]) > 1
    for rows in (5, 30, 80):
        fresh = of_rows.predict(torch.ones(rows), draws=400)
        assert fresh.mean.shape == (rows,)
        assert (fresh.mean - 3).abs().max() < 0.1


def test_batches_of_rows_give_the_functions_of_all(posterior):
    x = torch.linspace(-3, 3, 50).reshape(-1, 1)
    whole = posterior.predict(x, draws=20, seed=4)
    for size in (1, 7, 50, 1000):
        parts = posterior.predict(x, draws=20, seed=4, batch_size=size)
        torch.testing.assert_close(parts.draws, whole.draws)
        torch.testing.assert_close(parts.noise, whole.noise)
        assert parts.samples.shape == whole.samples.shape
    y = x[:, 0]
    one, other = (posterior.log_likelihood(x, y, draws=9, batch_size=size)["y"] for size in (None, 8))
    torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="batch_size is 0"):
        posterior.predict(x, batch_size=0)


def amortized(x, y=None):
    """A guide that takes new rows."""
    mu = pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(3.0)), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(mu + x, 1e-3))


@pytest.mark.parametrize("rows", [30, 12])
def test_batches_of_rows_with_latents_of_their_own_share_the_others(rows):
    x = torch.linspace(0, 1, 30)
    posterior = fit(local, amortized, x, x + 3, steps=5, progress=False)
    found = posterior.predict(x[:rows], draws=40, batch_size=7).draws
    assert found.shape == (40, rows)
    shared = found - x[:rows]
    assert shared.std(1).max() < 0.01
    assert shared.std(0).min() > 0.2


def test_batches_of_the_rows_of_the_fit_keep_their_latents(of_rows):
    whole = of_rows.predict_data(draws=50)
    torch.testing.assert_close(of_rows.predict_data(draws=50, batch_size=8).draws, whole.draws)


def test_a_likelihood_without_a_mean_is_described_by_its_draws():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Cauchy(w * x, 1.0), obs=y)

    x = torch.linspace(-2, 2, 30)
    p = fit(model, AutoNormal(model), x, x, steps=50, progress=False).predict(x, draws=50)
    assert torch.isfinite(p.draws).all()
    assert torch.equal(p.draws, p.samples)


def test_several_observed_sites_must_be_named(line):
    def model(x, y=None, z=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(w * x[:, 0], 1.0), obs=y)
            pyro.sample("b", dist.Normal(w, 1.0), obs=z)

    posterior = fit(model, AutoNormal(model), line.x, line.y, line.y, steps=20, progress=False)
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*site="):
        posterior.predict(line.x)
    assert posterior.predict(line.x, site="b", draws=3).samples.shape == (3, 40)
    assert set(posterior.log_likelihood(draws=2)) == {"a", "b"}


def test_log_predictive_density_is_the_log_of_the_mean():
    density = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    torch.testing.assert_close(log_predictive_density(density.log()), torch.tensor([0.2, 0.3]).log())


def test_what_draws_say_of_classes():
    """Of four draws of two rows of three classes."""
    draws = torch.tensor([[[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]]] * 2 + [[[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]]] * 2)
    p = ClassPrediction("y", draws, torch.tensor([[0, 1], [0, 1], [0, 0], [0, 2]]))
    torch.testing.assert_close(p.variation_ratio, torch.tensor([0.0, 0.5]))
    assert p.mutual_information[0] < 1e-6 < p.mutual_information[1]
    found = class_scores(p, torch.tensor([0, 2]))
    assert (found.rows, found.accuracy, found.error_auroc) == (2, 0.5, 1.0)
    assert found.calibration_error == pytest.approx((0.2 + 0.5) / 2)
    assert found.log_likelihood == pytest.approx((math.log(0.8) + math.log(0.1)) / 2)
    assert class_scores(p, torch.tensor([0, 1])).error_auroc is None
    with pytest.raises(ValueError, match="observed classes go from 0 to 3 but the model knows 0 to 2"):
        class_scores(p, torch.tensor([0, 3]))


def test_scores_against_hand_computed_ones():
    draws = torch.tensor([[0.0, 10.0], [2.0, 10.0]])
    p = Prediction("y", draws, torch.linspace(0, 1, 101)[:, None].expand(101, 2), torch.zeros(2))
    found = scores(p, torch.tensor([0.5, 13.0]), torch.zeros(4, 2))
    assert found.rmse == pytest.approx(math.sqrt((0.5**2 + 3**2) / 2))
    assert (found.rows, found.log_likelihood) == (2, 0.0)
    assert [(c.prob, c.share) for c in found.coverage] == [(0.5, 0.5), (0.8, 0.5), (0.9, 0.5), (0.95, 0.5)]
