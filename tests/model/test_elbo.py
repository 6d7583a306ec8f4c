import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger

from guides import mean_field_normal
from inference import fit
from inference.engine.eager import EagerEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.model.elbo import loss
from inference.utils.random_state import RandomStream


def mixed(x, y=None):
    """Scales, masks, factors, two plates and a constrained latent."""
    sigma = pyro.sample("sigma", dist.Gamma(2.0, 2.0))
    with pyro.plate("groups", 3):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    pyro.factor("pull", -offset.square().sum())
    with poutine.scale(scale=2.0), pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("y", dist.Normal(offset[0] + x[:, 0], sigma), obs=y)


def program_of(model, guide, *args):
    stream = RandomStream.seeded(0)
    return BoundModel.start(model, guide, args, stream, torch.device("cpu"), torch.float64), stream


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoDelta, AutoNormalMessenger])
def test_loss_and_gradient_are_those_of_trace_elbo(line, guide):
    args = (line.x.double(), line.y.double())
    bound_model, _ = program_of(mixed, guide(mixed), *args)
    flat_params = bound_model.params.flatten()
    results = []
    for estimate in (
        lambda: loss(bound_model.model, bound_model.guide, args, 3, not bound_model.score_function_sites)[0],
        lambda: Trace_ELBO(num_particles=3).differentiable_loss(bound_model.model, bound_model.guide, *args),
    ):
        grad = torch.zeros_like(flat_params)
        with bound_model.running(flat_params, RandomStream.seeded(5), grad):
            value = estimate()
            value.backward()
        results.append((value.detach(), grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-10)
    assert results[0][1].abs().max() > 0


def test_a_guide_without_reparameterisation_gets_its_score_function_terms():
    def model(y):
        rate = pyro.sample("rate", dist.Poisson(4.0))
        pyro.sample("y", dist.Normal(rate, 1.0).expand(y.shape).to_event(1), obs=y)

    def guide(y):
        pyro.sample("rate", dist.Poisson(pyro.param("mean", torch.tensor(2.0), constraint=dist.constraints.positive)))

    y = torch.tensor([7.0, 7.5, 6.5])
    bound_model, stream = program_of(model, guide, y)
    assert bound_model.score_function_sites == ("rate",)
    engine = EagerEngine(SVIProblem.on(bound_model, InMemory((y,)), lr=0.05, particles=10))
    state = engine.init(stream)
    engine.advance(state, 250)
    assert bound_model.params.constrained(state.flat_params)["mean"] == pytest.approx(6.8, abs=0.7)


def test_validation_runs_once_and_the_model_once_a_step(line):
    calls = []

    def model(x, y=None):
        calls.append(pyro.settings.get("validate_distributions_pyro"))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    bound_model, stream = program_of(model, mean_field_normal(model), line.x.double(), line.y.double())
    at_start = len(calls)
    assert all(calls)
    engine = EagerEngine(SVIProblem.on(bound_model, InMemory((line.x.double(), line.y.double()))))
    engine.advance(engine.init(stream), 7)
    assert calls[at_start:] == [False] * 7


def two_levels(x):
    """A latent that all rows share, and one of each row whose prior it moves."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 2.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def marked(closed):
    """A guide that is off, with its KL in closed form at both sites, or estimated."""

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.7))
        scale = pyro.param("scale", torch.tensor(1.3), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale), infer={"closed_form_kl": closed})
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * x, scale), infer={"closed_form_kl": closed})

    return guide


def losses_and_gradients(guide, draws):
    args = (torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64),)
    bound_model, _ = program_of(two_levels, guide, *args)
    flat_params = bound_model.params.flatten()
    found = []
    for seed in range(draws):
        grad = torch.zeros_like(flat_params)
        with bound_model.running(flat_params, RandomStream.seeded(seed), grad):
            value = loss(bound_model.model, bound_model.guide, args, 1, True)
            value[0].backward()
        found.append(torch.cat([value.detach(), grad]))
    return torch.stack(found)


def test_a_kl_in_closed_form_has_the_same_mean_and_gradient_as_its_estimate():
    """Both parts of the loss and both gradients, each within five Monte-Carlo errors; the variance is another."""
    estimated, closed = (losses_and_gradients(marked(flag), 1000) for flag in (False, True))
    error = torch.sqrt((estimated.var(0) + closed.var(0)) / 1000)
    assert ((estimated.mean(0) - closed.mean(0)).abs() < 5 * error).all()
    # Of w: KL(N(0.7, 1.3²) ‖ N(0, 1)); of z: given w, and over its draws.
    x = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    first = (1.3**2 + 0.7**2 - 1) / 2 - math.log(1.3)
    rows = (1.3**2 + 1.3**2 + (0.7 * x - 0.7) ** 2) / 8 - 0.5 - math.log(1.3 / 2)
    truth = first + float(rows.sum())
    assert abs(float(closed[:, 1].mean()) - truth) < 5 * float(closed[:, 1].std()) / math.sqrt(1000)
    assert float(closed[:, 1].var()) < float(estimated[:, 1].var())


@pytest.mark.slow
def test_the_two_parts_of_the_loss_are_those_of_each_step():
    """With a guide that does not move, the mean KL of the steps is the known one, on both engines."""
    x = torch.tensor([1.0, -0.5, 2.0])
    for engine in ("eager", "compiled"):
        posterior = fit(two_levels, marked(True), x, steps=1200, lr=1e-9, engine=engine, progress=False)
        expected = losses_and_gradients(marked(True), 600)[:, :2]
        for ours, theirs in zip((posterior.losses, posterior.kl), expected.T, strict=True):
            error = math.sqrt(float(theirs.var()) * (1 / 600 + 1 / 1200))
            assert abs(ours.mean() - float(theirs.mean())) < 5 * error


def test_without_a_closed_form_the_estimate_stays():
    def model(x):
        z = pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), infer={"closed_form_kl": True})

    kl = fit(model, guide, torch.tensor(0.0), steps=50, lr=1e-9, engine="eager", progress=False).kl
    assert np.isfinite(kl).all()
    assert np.ptp(kl) > 0.1
