"""Which engine runs a fit, and what is said where a model cannot be compiled."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from guides import mean_field_normal
from inference import fit
from inference.engine.selection import worth_compiling
from ppl_models import linear_regression
from tests.helpers.small_models import COMPILED, X, Y, closure


def value_dependent():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        mean = w if w > 0 else -w
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model, mean_field_normal(model), r"test_selection\.py:\d+ \(model\) needs the value"


def score_function():
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def guide(y):
        p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(p))

    return model, guide, r"sites \['k'\] have no reparameterised gradient"


def numpy_noise():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w + np.random.normal(), 1.0), obs=y)

    return model, mean_field_normal(model), "draws from NumPy's or Python's random numbers"


def counts_its_calls():
    calls = {"n": 0}

    def model(y):
        calls["n"] += 1
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w / calls["n"], 1.0), obs=y)

    return model, mean_field_normal(model), r"changes \['model.calls.n'\] while it runs and computes with it"


def running_statistics():
    norm = nn.BatchNorm1d(1)

    def model(y):
        pyro.module("norm", norm)
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(norm(w).sum(), 1.0), obs=y)

    return model, mean_field_normal(model), "changes a tensor that outlives the step"


def reads_by_numpy():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        mean = torch.tensor(float(np.tanh(w.detach().numpy())))
        pyro.sample("y", dist.Normal(mean + w, 1.0), obs=y)

    return model, mean_field_normal(model), r"test_selection\.py:\d+ \(model\) needs the value .*numpy"


def reads_by_list():
    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w.sum(), 1.0 + (w.tolist()[0] > 0)), obs=y)

    return model, mean_field_normal(model), r"test_selection\.py:\d+ \(model\) needs the value .*tolist"


REFUSED = [
    value_dependent,
    reads_by_numpy,
    reads_by_list,
    score_function,
    numpy_noise,
    counts_its_calls,
    running_statistics,
]


@pytest.mark.parametrize("build", REFUSED)
def test_what_cannot_be_recorded_is_refused_with_the_reason(build):
    model, guide, reason = build()
    with pytest.raises(ValueError, match=f"cannot be compiled: .*{reason}"):
        fit(model, guide, torch.tensor(1.0), steps=10, **COMPILED)


@pytest.mark.parametrize("build", REFUSED)
def test_auto_runs_it_eagerly_with_one_warning(build, monkeypatch):
    monkeypatch.setattr("inference.engine.selection._ALWAYS_EAGER", 10)
    model, guide, reason = build()
    with pytest.warns(UserWarning, match=reason) as caught:
        posterior = fit(model, guide, torch.tensor(1.0), steps=10, progress=False)
    assert len(caught) == 1
    assert posterior.record.options["engine"] == "eager"


def test_an_optimiser_without_a_compiled_form_is_named():
    with pytest.raises(ValueError, match="optimiser RAdam"):
        fit(linear_regression, mean_field_normal(linear_regression), X, Y, optimizer=torch.optim.RAdam, **COMPILED)


def test_auto_compiles_a_long_fit_and_not_a_short_one():
    fits = {
        steps: fit(linear_regression, mean_field_normal(linear_regression), X, Y, steps=steps, lr=0.02, progress=False)
        for steps in (1_000, 20_000)
    }
    assert {steps: p.record.options["engine"] for steps, p in fits.items()} == {1_000: "eager", 20_000: "compiled"}
    assert not worth_compiling(operators=450, steps=1_200)
    assert worth_compiling(operators=450, steps=10_000)


def test_no_compiler_is_one_warning_or_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = closure(1)[0]
    arguments = (model, mean_field_normal(model), torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"no C\+\+ compiler was found.*install g\+\+"):
        fit(*arguments, steps=10, **COMPILED)
    monkeypatch.setattr("inference.engine.selection.worth_compiling", lambda *_: True)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler") as caught:
        fit(*arguments, steps=1000, progress=False)
    assert len(caught) == 1


def test_a_callback_that_makes_the_model_unrecordable_says_so():
    settings = {"branch": False}

    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if settings["branch"] and w > 0:
            w = -w
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"\(model\) needs the value"):
        fit(
            *(model, mean_field_normal(model), torch.tensor(1.0)),
            steps=300,
            callbacks=[lambda progress: settings.update(branch=True)],
            **COMPILED,
        )
