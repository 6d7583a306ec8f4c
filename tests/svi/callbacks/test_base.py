"""Callbacks: when they are called, what they are told, and that a watched fit is the same fit."""

import numpy as np
import pytest
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import nn

from guides import bernoulli_dropout, mean_field_normal
from inference import every, fit
from inference.svi.callbacks.base import CallbackRunner
from ppl_models import DropoutNetwork, linear_regression

X = torch.linspace(-1, 1, 40).reshape(-1, 1)
Y = torch.cos(3 * X[:, 0])


def fitted(callbacks=(), steps=130, engine="eager", **options):
    guide = mean_field_normal(linear_regression)
    return fit(
        linear_regression,
        guide,
        X,
        Y,
        steps=steps,
        engine=engine,
        callbacks=callbacks,
        **{"progress": False, **options},
    )


def test_each_is_called_at_its_own_steps_and_at_the_end():
    steps = {"usual": [], "seven": [], "late": []}
    told = {name: [] for name in steps}

    def look(name):
        return lambda now: (steps[name].append(now.step), told[name].append(now.losses))

    posterior = fitted([look("usual"), every(7, look("seven")), every(1000, look("late"))])
    assert steps == {"usual": [100, 130], "seven": [*range(7, 130, 7), 130], "late": [130]}
    for losses in told.values():
        np.testing.assert_array_equal(torch.cat(losses), posterior.losses)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_watching_changes_no_number(engine):
    seen = []
    alone = fitted(engine=engine, steps=250)
    watched = fitted([every(7, lambda now: seen.append(now.posterior.predict(X[:3])))], engine=engine, steps=250)
    np.testing.assert_array_equal(alone.losses, watched.losses)
    np.testing.assert_array_equal(alone.kl, watched.kl)
    assert torch.equal(alone.sample(5)["weights"], watched.sample(5)["weights"])
    assert len(seen) == 36


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_its_posterior_is_that_of_a_shorter_fit_and_stays_it(engine):
    kept = {}
    fitted([every(60, lambda now: kept.setdefault(now.step, now.posterior))], engine=engine, steps=240)
    shorter = fitted(engine=engine, steps=60)
    assert torch.equal(kept[60].sample(4)["weights"], shorter.sample(4)["weights"])
    np.testing.assert_array_equal(kept[60].losses, shorter.losses)
    assert not torch.equal(kept[120].sample(4)["weights"], shorter.sample(4)["weights"])
    assert kept[60].record.options == {**shorter.record.options, "steps": 240}
    assert set(kept[60].params) == set(shorter.params)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_guide_that_was_asked_goes_on_being_fitted(engine):
    """Masks are drawn for each row while fitting, and one for all rows in a posterior."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    model = DropoutNetwork(net, noise=0.1)
    kept = []

    def run(*callbacks):
        options = {"steps": 60, "engine": engine, "callbacks": callbacks, "progress": False}
        return fit(model, bernoulli_dropout(model), X, Y, **options)

    alone = run()
    asked = run(every(10, lambda now: kept.append(now.posterior.sample(2)["mask.2"].shape)))
    np.testing.assert_array_equal(alone.losses, asked.losses)
    assert set(kept) == {(2, 1, 8)}


@pytest.mark.slow
def test_the_laplace_guide_is_finished_wherever_it_is_asked():
    spread = []
    fit(
        *(linear_regression, AutoLaplaceApproximation(linear_regression), X, Y),
        steps=3000,
        lr=0.02,
        callbacks=[every(1500, lambda now: spread.append(float(now.posterior.sample(100)["weights"].std())))],
        progress=False,
    )
    assert all(0.01 < value < 1 for value in spread)
    assert len(spread) == 2


def test_the_number_of_steps_is_checked():
    with pytest.raises(ValueError, match="steps"):
        every(0, print)


def test_what_a_callback_says_of_itself_is_heard():
    class Looks:
        every, only_looks = 7, True

        def __call__(self, now):
            pass

    class Changes(Looks):
        only_looks = False

    def runner(*callbacks):
        return CallbackRunner(callbacks, 1000, layout=None, make_posterior=None)

    assert [runner(one).until(0) for one in (Looks(), every(30, Looks()), print)] == [7, 30, 100]
    assert not runner(Looks(), every(30, Looks())).may_change
    assert all(runner(Looks(), one).may_change for one in (Changes(), every(30, Changes()), print))
