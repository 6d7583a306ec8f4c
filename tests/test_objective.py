import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger

from guides import mean_field_normal
from inference.eager import EagerEngine
from inference.isolation import RandomStream
from inference.objective import loss
from inference.program import Program
from inference.task import Task


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
    return Program.start(model, guide, args, stream, torch.device("cpu"), torch.float64), stream


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoDelta, AutoNormalMessenger])
def test_loss_and_gradient_are_those_of_trace_elbo(line, guide):
    args = (line.x.double(), line.y.double())
    program, _ = program_of(mixed, guide(mixed), *args)
    flat = program.params.flatten()
    results = []
    for estimate in (
        lambda: loss(program.model, program.guide, args, 3, not program.scored),
        lambda: Trace_ELBO(num_particles=3).differentiable_loss(program.model, program.guide, *args),
    ):
        grad = torch.zeros_like(flat)
        with program.running(flat, RandomStream.seeded(5), grad):
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
    program, stream = program_of(model, guide, y)
    assert program.scored == ("rate",)
    engine = EagerEngine(Task.of(program, (y,), lr=0.05, particles=20))
    state = engine.init(stream)
    engine.advance(state, 400)
    assert program.params.constrained(state.flat)["mean"] == pytest.approx(6.8, abs=0.7)


def test_validation_runs_once_and_the_model_once_a_step(line):
    calls = []

    def model(x, y=None):
        calls.append(pyro.settings.get("validate_distributions_pyro"))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    program, stream = program_of(model, mean_field_normal(model), line.x.double(), line.y.double())
    at_start = len(calls)
    assert all(calls)
    engine = EagerEngine(Task.of(program, (line.x.double(), line.y.double())))
    engine.advance(engine.init(stream), 7)
    assert calls[at_start:] == [False] * 7
