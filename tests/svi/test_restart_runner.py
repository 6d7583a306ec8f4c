"""The steps of one restart: what its record says of them, and what a failure leaves."""

from functools import partial

import pyro
import pytest
import torch

from guides import mean_field_normal
from inference import NonFinite, every, fit
from ppl_models import linear_regression

MODEL = partial(linear_regression, noise=0.5)


def fitted(line, **options):
    return fit(MODEL, mean_field_normal(MODEL), line.x, line.y, progress=False, **options)


def test_the_record_holds_the_engine_and_what_was_searched(line):
    fixed = fitted(line, steps=20, lr=0.05, engine="eager").record.options
    assert (fixed["engine"], fixed["lr"], fixed["optimizer"]) == ("eager", 0.05, "adam")
    searched = fitted(line, steps=20, optimizer="auto", engine="eager").record.options
    assert (searched["engine"], searched["lr"], searched["optimizer"]) == ("eager", "found", "auto")


def test_a_restart_without_an_initial_normal_says_why(line):
    posterior = fitted(line, steps=20, optimizer="auto", init="prior", engine="eager")
    assert posterior.stop_reason.endswith("it began where the guide does: the guide's own start was asked for")


def test_a_step_that_fails_leaves_the_posterior_before_it(line):
    scale = torch.ones(())

    def model(x, y=None):
        pyro.factor("harm", scale.log())
        return MODEL(x, y)

    harm = every(10, lambda now: scale.fill_(torch.nan) if now.step == 10 else None)
    with pytest.raises(NonFinite) as caught:
        fit(
            *(model, mean_field_normal(model), line.x, line.y),
            **{"steps": 30, "lr": 0.05, "engine": "eager", "callbacks": [harm], "progress": False},
        )
    assert len(caught.value.posterior.losses) == 10
