"""Steps that are found where there is no start: what they reach beside tuned Adam, and what they say of their end."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from guides import amortized_encoder, bernoulli_dropout, mean_field_normal
from inference import cosine_decay, fit, fresh, load
from inference.model.bound_model import BoundModel
from inference.model.elbo import loss
from inference.optim.optimizers import Updating
from inference.optim.prodigy import Prodigy
from inference.utils.random_state import RandomStream
from ppl_models import VAE, DropoutRegression, bnn_regression, linear_regression
from ppl_models.data.datasets import digits
from tests.helpers.engines import losses_of_both

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 2, generator=GENERATOR)
Y = X @ torch.tensor([1.0, -2.0]) + 3 + 0.5 * torch.randn(200, generator=GENERATOR)


def found(model, guide, *data, **options):
    return fit(model, guide, *data, **{"optimizer": "auto", "progress": False, "engine": "eager", **options})


def descended(scale, steps=2000, early=False, target=3.0):
    """θ after noisy gradients of scale·‖θ − target‖²/2, from 0, and the update."""
    flat_params = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    update = Prodigy(flat_params.detach(), steps, early)
    optimizer, noise = Updating(flat_params, update), torch.Generator().manual_seed(0)
    for _ in range(steps):
        flat_params.grad = scale * (
            flat_params.detach() - target + 0.1 * torch.randn(5, dtype=torch.float64, generator=noise)
        )
        optimizer.step()
    return flat_params.detach()


@pytest.mark.parametrize("target", [0.03, 3.0, 300.0])
def test_the_distance_is_found_whatever_the_scale_of_the_parameters(target):
    """The noise of one gradient is 0.1, so that an average of hundreds is known to a tenth of it."""
    assert ((descended(1.0, target=target) - target).abs() < 0.03 + 0.01 * target).all()


def test_the_path_does_not_depend_on_the_units_of_the_loss():
    torch.testing.assert_close(descended(1.0), descended(1e4), rtol=1e-5, atol=1e-7)


def same_losses():
    model = partial(linear_regression, noise=0.5, intercept=False)
    guide = mean_field_normal(model)
    stream = RandomStream.seeded(0)
    data = (X.double(), Y.double())
    theta = BoundModel.start(model, guide, data, stream, CPU, torch.float64).params.flatten()
    adaptive = Prodigy(theta, 2000)
    ours, theirs, mine, other = losses_of_both(model, guide, data, steps=200, batch_size=20, adaptive=adaptive)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=1e-9, atol=0)
    torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
    assert (mine - theta).abs().max() > 0.01


@pytest.mark.slow
def test_same_noise_same_losses_on_both_engines():
    same_losses()


def test_the_recorded_step_has_the_same_losses(interpreted):
    same_losses()


def elbo(posterior, draws=40):
    """Mean and standard error of the ELBO on all rows."""
    bound_model = posterior.bound_model
    theta = torch.cat([value.reshape(-1) for value in posterior.unconstrained_params.values()])
    with bound_model.running(theta, RandomStream.seeded(1)), torch.no_grad():
        losses = [float(loss(bound_model.model, bound_model.guide, posterior.data, 1, True)[0]) for _ in range(draws)]
    return -np.mean(losses), np.std(losses) / np.sqrt(draws)


@pytest.mark.slow
def test_an_autoencoder_in_mini_batches_is_as_good_as_with_tuned_adam():
    """Within four standard errors and the difference that a seed makes; Adam with too small a step is not."""
    x = torch.tensor((digits().x > 7).astype(np.float32))

    def fitted(**options):
        torch.manual_seed(0)
        model = VAE(64, latent=2, hidden=[16])
        posterior = fit(
            model, amortized_encoder(model), x, steps=500, batch_size=100, engine="eager", progress=False, **options
        )
        return elbo(posterior)

    adam = partial(fitted, optimizer="adam")
    tuned, other = (adam(lr=cosine_decay(0.02, 500), seed=seed) for seed in (0, 1))
    spread = abs(tuned[0] - other[0]) + 4 * np.hypot(tuned[1], other[1])
    ours, small = fitted(), adam(lr=cosine_decay(1e-3, 500))
    least = tuned[0] - 2 * spread
    assert ours[0] > least
    assert small[0] < least


def test_rows_in_columns_of_any_scale_are_learned():
    """A dropout network on columns a hundred times as large: its ELBO rises, where it began with losses as large."""
    torch.manual_seed(0)
    model = DropoutRegression(2, hidden=20, noise=0.5)
    posterior = found(model, bernoulli_dropout(model), 100 * X, Y, steps=1000, batch_size=50)
    assert np.isfinite(posterior.losses).all()
    assert posterior.losses[-100:].mean() < 0.05 * posterior.losses[:20].mean()


@pytest.mark.slow
def test_guides_without_a_start_are_fitted_by_default():
    """A guide by hand, a point with a parameter of the model, and data that never come again."""

    def model(x, y=None):
        bias = pyro.param("bias", torch.tensor(0.0))
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weights + bias, 0.5), obs=y)

    def by_hand(x, y=None):
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        pyro.sample("weights", dist.Normal(loc, scale).to_event(1))

    exact = torch.linalg.lstsq(torch.cat([X, torch.ones(200, 1)], 1), Y[:, None]).solution[:, 0]
    for guide in (by_hand, AutoDelta(model)):
        posterior = fit(model, guide, X, Y, steps=3000, engine="eager", progress=False)
        assert posterior.record.options["optimizer"] == "auto"
        values = posterior.params
        place = values["loc"] if "loc" in values else values["AutoDelta.weights"]
        sd = 0.5 / np.sqrt(200)
        assert (torch.cat([place, values["bias"][None]]) - exact).abs().max() < 0.5 * sd

    def points():
        x = torch.rand(50, 2)
        return x, 3 * x[:, 0] - 1

    streamed = fit(model, by_hand, fresh(points), steps=1000, engine="eager", progress=False)
    assert float(streamed.params["loc"][0]) == pytest.approx(3, abs=0.1)


def test_the_end_is_where_the_elbo_is_known_to_be_flat():
    """Losses as noise about a level, and about a slope."""
    noise = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    flat_params, rising = Prodigy(torch.zeros(1), 60_000), Prodigy(torch.zeros(1), 60_000)
    for step in range(100, 60_001, 100):
        flat_params.look(step, [], 50 + noise[:step])
        rising.look(step, [], 50 + noise[:step] - 1e-3 * torch.arange(step))
    assert flat_params.stop.converged
    assert flat_params.settling == 15_000
    assert flat_params.steps == 30_000
    assert flat_params.stop.reason.startswith("converged after 15,000 steps, at which the ELBO was flat")
    assert not rising.stop.converged
    assert rising.steps == 60_000
    assert "is not known to be below 0.5" in rising.stop.reason


def test_the_steps_rise_stay_and_fall_to_nothing():
    update = Prodigy(torch.zeros(1), 4000)
    sizes = [update.step_size(step) for step in range(4000)]
    assert sizes[0] == pytest.approx(0.01)
    assert set(sizes[100:2000]) == {1.0}
    assert sizes[3000] == pytest.approx(0.5)
    assert sizes[-1] == pytest.approx(1 / 2000)


def test_what_it_says_of_its_end_is_saved(tmp_path):
    model = partial(bnn_regression, hidden=[3])
    guide = mean_field_normal(model)
    short = found(model, guide, X, Y, steps=150, batch_size=50)
    assert short.stop_reason == "150 steps are too few to see whether the ELBO had settled"
    whole = found(model, guide, X, Y, steps=150, batch_size=50, stop="steps")
    assert whole.stop_reason == "all 150 steps were taken, as was asked"
    short.save(tmp_path / "run")
    assert load(tmp_path / "run", model, guide).record.stop == short.record.stop


def test_a_fit_that_settles_ends_early():
    model = partial(linear_regression, noise=0.5, intercept=False)
    posterior = found(model, AutoDelta(model), X, Y, steps=4000, batch_size=200)
    assert posterior.record.stop.converged
    assert len(posterior.losses) < 4000
