"""Data drawn anew at each step: on both engines, by torch and by NumPy, and what is refused."""

from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from guides import mean_field_normal
from inference import fit, fresh
from inference.data.generated_dataset import GeneratedBatches
from ppl_models import linear_regression
from tests.helpers.engines import losses_of_both

LINE = partial(linear_regression, noise=0.1)


def points():
    x = torch.rand(50, 1)
    return x, 3 * x[:, 0] - 1 + 0.1 * torch.randn(50)


def fitted(source=points, steps=600, **options):
    return fit(LINE, mean_field_normal(LINE), fresh(source), steps=steps, **{"progress": False, "lr": 0.03, **options})


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_each_step_sees_new_data(engine):
    """The mean of x in a model without latents is the loss; over many steps it is 1/2, with the spread of 50 draws."""

    def model(x):
        pyro.param("unused", torch.zeros(()))
        pyro.factor("minus the mean", -x.mean())

    posterior = fit(model, lambda x: None, fresh(lambda: torch.rand(50)), steps=1000, engine=engine, progress=False)
    sd = np.sqrt(1 / 12 / 50)
    assert abs(posterior.losses.mean() - 0.5) < 5 * sd / np.sqrt(1000)
    assert posterior.losses.std() == pytest.approx(sd, rel=5 / np.sqrt(2000))


@pytest.mark.parametrize("engine", [pytest.param("eager", marks=pytest.mark.slow), "compiled"])
def test_a_line_is_learned_from_points_that_never_come_again(engine):
    posterior = fitted(engine=engine, steps=1500)
    found = {name: float(value.mean()) for name, value in posterior.sample(500).items()}
    assert found["weights"] == pytest.approx(3, abs=0.15)
    assert found["bias"] == pytest.approx(-1, abs=0.1)
    assert [value.shape for value in posterior.data] == [(50, 1), (50,)]
    assert posterior.argument_names == ["x", "y"]
    assert posterior.predict(torch.rand(7, 1), draws=10).mean.shape == (7,)


def same_losses(particles):
    feed = GeneratedBatches(fresh(points), ["x", "y"], torch.device("cpu"), torch.float64, 0)
    case = (LINE, mean_field_normal(LINE), feed.first)
    ours, theirs, theta, reference = losses_of_both(*case, data=feed, particles=particles)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(theta, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 4])
def test_same_noise_same_losses_on_both_engines(particles):
    same_losses(particles)


@pytest.mark.parametrize("particles", [1, 4])
def test_the_recorded_step_has_the_same_losses(interpreted, particles):
    same_losses(particles)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_the_seed_fixes_the_data_and_the_process_keeps_its_random_state(engine):
    before = torch.get_rng_state()
    first, again, other = (fitted(seed=seed, steps=200, engine=engine) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(first.losses, again.losses)
    assert not np.array_equal(first.losses, other.losses)
    assert torch.equal(first.data[0], again.data[0])


@pytest.mark.parametrize("own", [True, False])
def test_numpys_numbers_run_eagerly_and_are_refused_by_the_compiled_engine(own):
    """Its global state as well as a generator of the user's own, which a recording would have frozen."""
    random = np.random.default_rng(0)

    def by_numpy():
        x = random.random((50, 1)) if own else np.random.random((50, 1))
        return x, 3 * x[:, 0] - 1

    posterior = fitted(by_numpy, engine="eager")
    assert float(posterior.sample(500)["weights"].mean()) == pytest.approx(3, abs=0.4)
    with pytest.raises(ValueError, match="fresh data are not drawn by torch's random numbers alone"):
        fitted(by_numpy, engine="compiled")


def test_what_cannot_be_fed_is_refused():
    sizes = iter([50, 50, 50, 40, 40, 40])

    def fewer():
        x = torch.rand(next(sizes), 1)
        return x, x[:, 0]

    with pytest.raises(ValueError, match=r"shapes \[\(50, 1\), \(50,\)\] first, now \[\(40, 1\), \(40,\)\]"):
        fitted(fewer, engine="eager")
    with pytest.raises(ValueError, match="let the function draw fewer rows"):
        fitted(batch_size=10)
    with pytest.raises(ValueError, match="fresh data stand alone, found 2 arguments"):
        fit(linear_regression, mean_field_normal(linear_regression), fresh(points), torch.ones(50), steps=5)
    with pytest.raises(TypeError, match="takes a function"):
        fresh(torch.ones(3))
    with pytest.raises(ValueError, match="x has 50 rows but y has 49"):
        fitted(lambda: (torch.rand(50, 1), torch.rand(49)))


def test_a_point_estimate_by_autodelta():
    posterior = fit(
        *(linear_regression, AutoDelta(linear_regression), fresh(points)), steps=800, lr=0.05, progress=False
    )
    assert float(posterior.params["AutoDelta.weights"][0]) == pytest.approx(3, abs=0.15)
