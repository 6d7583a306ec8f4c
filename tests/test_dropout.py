"""Dropout as a Bernoulli guide: named masks, the paper's objective, functions rather than noise."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from guides import bernoulli_dropout
from inference import fit, load
from inference.isolation import RandomStream
from inference.objective import loss
from inference.program import Program, set_training
from ppl_models import DropoutNetwork, linear_regression

X = torch.linspace(-1, 1, 30).reshape(-1, 1)
Y = torch.sin(3 * X[:, 0])


def network(outputs=1, p=0.3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(1, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, outputs))


def fitted(**options):
    model = DropoutNetwork(network(), noise=0.2, length_scale=0.5)
    return fit(model, bernoulli_dropout(model), X, Y, progress=False, **{"steps": 200, **options})


@pytest.mark.parametrize("per_row", [True, False])
def test_the_elbo_is_the_papers_objective(per_row):
    """Σ log N(y; f, σ) − Σ k l²/2 ‖M‖² − Σ l²/2 ‖m‖², with the paper's M = W/k, written out for the masks drawn."""
    noise, length, keeps = 0.2, 0.7, {1: 0.9, 4: 0.7}
    net = network().double()
    model = DropoutNetwork(net, noise=noise, length_scale=length)
    guide = bernoulli_dropout(model, per_row=per_row)
    args = (X.double(), Y.double())
    program = Program.start(model, guide, args, RandomStream.seeded(0), torch.device("cpu"), torch.float64)
    set_training(program.guide, True)
    with torch.no_grad(), program.running(program.params.flatten(), RandomStream.seeded(3)):
        found = loss(model, program.guide, args, 1, True)
    with program.running(program.params.flatten(), RandomStream.seeded(3)):
        masks = poutine.trace(program.guide).get_trace(*args).nodes
    first, second = (masks[f"mask.{i}"]["value"] for i in (0, 3))
    assert first.shape == (30 if per_row else 1, 1)
    assert second.shape == (30 if per_row else 1, 8)
    w = {i: net[i].weight.detach() / k for i, k in keeps.items()}
    m = {i: net[i].bias.detach() for i in keeps}
    hidden = torch.relu((args[0] * first) @ w[1].T + m[1])
    f = ((hidden * second) @ w[4].T + m[4])[:, 0]
    fits = (-0.5 * ((args[1] - f) / noise) ** 2 - math.log(noise) - 0.5 * math.log(2 * math.pi)).sum()
    decay = sum(k * length**2 / 2 * w[i].square().sum() + length**2 / 2 * m[i].square().sum() for i, k in keeps.items())
    assert float(found) == pytest.approx(float(decay - fits), abs=1e-10)


def test_masks_of_each_row_estimate_the_same_elbo_with_less_noise():
    """Over 2,000 draws the two means agree within 5 standard errors of their difference."""
    values = {}
    model = DropoutNetwork(network(), noise=0.2)
    for per_row in (True, False):
        guide = bernoulli_dropout(model, per_row=per_row)
        program = Program.start(model, guide, (X, Y), RandomStream.seeded(0), torch.device("cpu"), torch.float32)
        set_training(program.guide, True)
        with torch.no_grad(), program.running(program.params.flatten(), RandomStream.seeded(1)):
            values[per_row] = torch.stack([loss(model, program.guide, (X, Y), 1, True) for _ in range(2000)])
    error = math.sqrt(sum(v.var() / 2000 for v in values.values()))
    assert abs(values[True].mean() - values[False].mean()) < 5 * error
    assert values[True].var() < values[False].var() / 4


def test_masks_are_sites_and_a_draw_is_a_function():
    posterior = fitted()
    draws = posterior.sample(50)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"mask.0": (50, 1, 1), "mask.3": (50, 1, 8)}
    assert set(draws["mask.3"].unique().tolist()) == {0.0, 1.0}
    assert abs(draws["mask.3"].mean() - 0.7) < 5 * math.sqrt(0.21 / 400)
    whole = posterior.predict(X, draws=20, seed=4).draws
    torch.testing.assert_close(posterior.predict(X, draws=20, seed=4).draws, whole, rtol=0, atol=0)
    parts = [posterior.predict(part, draws=20, seed=4).draws for part in X.split(10)]
    assert "mask.3" in posterior.to_arviz(draws=10)["posterior"]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_fresh_masks_for_each_row_would_not_be_functions():
    posterior = fitted()
    set_training(posterior.program.guide, True)
    same = X[:1].expand(30, 1)
    assert posterior.predict(same, draws=5).draws.std(1).max() > 0.01
    set_training(posterior.program.guide, False)
    assert posterior.predict(same, draws=5).draws.std(1).max() < 1e-6


def test_it_learns_in_both_engines_and_with_mini_batches():
    for options in ({"engine": "eager"}, {"engine": "compiled"}, {"engine": "eager", "batch_size": 10}):
        posterior = fitted(steps=800, lr=0.01, **options)
        assert posterior.losses[-100:].mean() < posterior.losses[:20].mean() - 15, options


def test_there_is_no_khat_and_the_reason_is_given():
    diagnosis = fitted().diagnose()
    assert diagnosis.khat is None
    assert "no common density" in diagnosis.reasons[0]
    assert "held out" in diagnosis.advice[0]


def test_classes_saving_and_the_users_network(tmp_path):
    net = network(outputs=3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = DropoutNetwork(net)
    labels = (X[:, 0] > 0).long()
    posterior = fit(model, bernoulli_dropout(model), X, labels, steps=50, progress=False)
    assert posterior.predict(X[:4], draws=10).probs.shape == (4, 3)
    posterior.save(tmp_path / "run")
    again = DropoutNetwork(net)
    loaded = load(tmp_path / "run", again, bernoulli_dropout(again))
    torch.testing.assert_close(loaded.predict(X[:4], draws=10).probs, posterior.predict(X[:4], draws=10).probs)
    assert isinstance(net[3], nn.Dropout)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DropoutNetwork(nn.Linear(1, 1)), "Linear has no nn.Dropout"),
        (lambda: DropoutNetwork(nn.Sequential(nn.Dropout2d(), nn.Linear(1, 1))), "0 is Dropout2d: only nn.Dropout"),
        (lambda: DropoutNetwork(network(), noise=0), "noise is 0"),
        (lambda: DropoutNetwork(network(), length_scale="long"), "length_scale is 'long'"),
        (
            lambda: fit(linear_regression, bernoulli_dropout(linear_regression), X, Y, steps=5, progress=False),
            "site 'weights' is Normal.*for models whose latents are Bernoulli masks",
        ),
    ],
)
def test_what_cannot_be_a_dropout_model_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_distribution_of_a_mask_is_the_models():
    model = DropoutNetwork(network(), noise=0.2)
    site = poutine.trace(model).get_trace(X, Y).nodes["mask.3"]["fn"]
    assert isinstance(site.base_dist, dist.Bernoulli)
    assert torch.allclose(site.base_dist.probs, torch.full((1, 8), 0.7))
