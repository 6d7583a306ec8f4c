"""The recorded step has the losses of the eager one, for many kinds of models and guides."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints

import guides
from guides import mean_field_normal
from inference import cosine_decay
from inference.engine.compiled import CompiledEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.engine.tracing.random_ops import ReplayRandomOps
from inference.model.bound_model import BoundModel
from inference.utils.random_state import RandomStream
from ppl_models import bnn_regression, linear_regression
from tests.helpers.small_models import CPU, X, Y, check

GROUP = torch.arange(40) % 5


def eight_schools():
    """Rubin (1981), centred."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model, mean_field_normal(model), (y, sigma)


def crossed_plates():
    def model(y):
        rows = pyro.plate("rows", 6, dim=-2)
        columns = pyro.plate("columns", 5, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns, poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(a + b, 0.5), obs=y)

    return model, mean_field_normal(model), (torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),)


def by_hand():
    """A guide function with constrained parameters, a mask and a factor."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.factor("soft", -0.1 * w**2)
        with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("y", dist.Normal(w * x[:, 0], s), obs=y)

    def guide(x, y):
        loc = pyro.param("loc", torch.zeros((), dtype=x.dtype))
        scale = pyro.param("scale", torch.full((), 0.1, dtype=x.dtype), constraint=constraints.positive)
        unused = pyro.param("unused", torch.ones(3, dtype=x.dtype))
        del unused
        pyro.sample("w", dist.Normal(loc, scale))
        mean = pyro.param("mean", torch.full((), -1.0, dtype=x.dtype), constraint=constraints.interval(-3, 3))
        pyro.sample("s", dist.LogNormal(mean, scale))

    return model, guide, (X, Y)


def gamma_and_dirichlet():
    def model(counts):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.1))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=torch.get_default_dtype())))
        with pyro.plate("data", len(counts)):
            pyro.sample("y", dist.Poisson(rate * share).to_event(1), obs=counts)

    def guide(counts):
        like = torch.get_default_dtype()
        a = pyro.param("a", torch.full((), 20.0, dtype=like), constraint=constraints.positive)
        b = pyro.param("b", torch.full((), 1.0, dtype=like), constraint=constraints.positive)
        c = pyro.param("c", torch.full((3,), 5.0, dtype=like), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(a, b))
        pyro.sample("share", dist.Dirichlet(c))

    return model, guide, (torch.tensor([[3.0, 5, 9], [2, 6, 12], [5, 5, 8]]),)


class Network(PyroModule):
    """A network with priors on its weights, as Pyro's tutorial writes one."""

    def __init__(self):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](1, 4)
        self.hidden.weight = PyroSample(lambda self: dist.Normal(0.0, self.one).expand([4, 1]).to_event(2))
        self.hidden.bias = PyroSample(lambda self: dist.Normal(0.0, self.one).expand([4]).to_event(1))
        self.hidden.register_buffer("one", torch.ones(()))
        self.out = nn.Linear(4, 1)

    def forward(self, x, y=None):
        mean = self.out(torch.tanh(self.hidden(x)))[:, 0]
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


def pyro_module():
    torch.manual_seed(0)
    model = Network().double()
    return model, autoguide.AutoMultivariateNormal(model), (X, Y)


def amortised(batch=True):
    """An encoder and a decoder under pyro.module, local latents, mini-batches."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(3, 2).double(), nn.Sequential(nn.Linear(1, 8), nn.ELU(), nn.Linear(8, 3)).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=10 if batch else None) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(len(rows), 1, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[rows])

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample_size=10 if batch else None) as rows:
            loc, log_scale = encoder(x[rows]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = (torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) > 0.4).double()
    return model, guide, (x,)


def dropout():
    """Masks are latents with fixed probabilities; the weights are parameters of the guide."""

    def model(x, y):
        w = pyro.param("w", 0.3 * torch.ones(5, dtype=x.dtype))
        mask = pyro.sample("mask", dist.Bernoulli(0.5 * torch.ones(5, dtype=x.dtype)).to_event(1))
        mean = torch.tanh(x * w * mask).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.2), obs=y)

    def guide(x, y):
        pyro.sample("mask", dist.Bernoulli(0.5 * torch.ones(5, dtype=x.dtype)).to_event(1))

    return model, guide, (X, Y)


def grouped():
    """The number of groups is read from the data, a fixed mask picks rows, a matrix is factorised."""

    def model(x, y, group):
        groups = int(group.max()) + 1
        scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([groups]).to_event(1))
        tril = torch.linalg.cholesky(torch.eye(groups, dtype=x.dtype) + scale[:, None] * scale)
        level = pyro.sample("level", dist.MultivariateNormal(torch.zeros(groups, dtype=x.dtype), scale_tril=tril))
        mean = level[group]
        low = x[:, 0] < 0
        pyro.sample("low", dist.Normal(mean[low], 0.3).to_event(1), obs=y[low])
        pyro.sample("high", dist.Normal(mean[~low], 0.5).to_event(1), obs=y[~low])

    return model, mean_field_normal(model), (X, Y, GROUP)


def line(build):
    return linear_regression, build(linear_regression), (X, Y)


def slope():
    """One latent, for what does not depend on the model."""
    model = partial(linear_regression, noise=0.3, intercept=False)
    return model, mean_field_normal(model), (X, Y)


def in_place():
    """Tensors filled piece by piece, as many people write a covariance or a state."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        mean = torch.zeros(len(x), dtype=x.dtype)
        mean[:20] = w[0] * x[:20, 0]
        mean[20:] = w[1] * x[20:, 0]
        noise = torch.empty(3, dtype=x.dtype)
        noise[1:].uniform_(0.5, 1.0)
        pyro.sample("y", dist.Normal(mean, noise[1] + noise[2]).to_event(1), obs=y)

    return model, mean_field_normal(model), (X, Y)


def shapes():
    """Every change of shape that has a rule of its own where particles lie side by side."""

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 3, dtype=y.dtype), 1.0).to_event(2))
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=y.dtype), 1.0).to_event(1))
        a = (z @ z.T) @ w + z.mean(1) + torch.linalg.vector_norm(z, dim=-1)
        b = torch.cat([a, w.sum().reshape(1)]) + torch.stack([z[0, 1], z[1, 2], w[0]])
        c = z.reshape(3, 2).permute(1, 0).unsqueeze(0).squeeze(0).expand(4, 2, 3).sum((0, 1)) * w.dot(w)
        first, second = z.split([1, 1])
        pyro.sample("y", dist.Normal(b + c + first[0] * second[0].mean(), 0.5).to_event(1), obs=y)

    return model, mean_field_normal(model), (torch.tensor([0.5, -1.0, 2.0]),)


def planar_flow(model):
    torch.manual_seed(0)
    transforms = pyro.distributions.transforms
    return autoguide.AutoNormalizingFlow(model, partial(transforms.iterated, 3, transforms.planar))


def annealed(step):
    return min(1.0, 0.1 + step / 100)


KINDS = {
    "eight schools": (eight_schools, {}),
    "two plates, a scale": (crossed_plates, {}),
    "constrained parameters, mask, factor": (by_hand, {}),
    "Gamma and Dirichlet": (gamma_and_dirichlet, {}),
    "PyroModule, full rank": (pyro_module, {}),
    "amortised, mini-batches": (amortised, {}),
    "Bernoulli masks": (dropout, {}),
    "groups, fixed masks, Cholesky": (grouped, {}),
    "filled in place": (in_place, {}),
    "low rank": (partial(line, partial(autoguide.AutoLowRankMultivariateNormal, rank=2)), {}),
    "point": (partial(line, autoguide.AutoDelta), {}),
    "stacked planar layers, particles side by side": (
        partial(line, guides.planar_flow),
        {"particles": 32, "steps": 5, "anneal": annealed},
    ),
    "stacked planar layers, particles by vmap": (
        partial(line, guides.planar_flow),
        {"particles": 4, "steps": 20, "anneal": annealed},
    ),
    "splines": (partial(line, partial(guides.spline_flow, layers=1, hidden=[8])), {"particles": 2, "steps": 20}),
    "annealed": (by_hand, {"anneal": annealed}),
    "shapes, particles side by side": (shapes, {"particles": 32, "steps": 5}),
    "inverse autoregressive flow": (partial(line, partial(autoguide.AutoIAFNormal, hidden_dim=[8])), {}),
    "particles": (eight_schools, {"particles": 4, "steps": 20}),
    "particles that vmap cannot batch": (in_place, {"particles": 2, "steps": 30}),
    "batch_size": (slope, {"batch_size": 7}),
    "AdamW, a schedule": (slope, {"optimizer": "adamw", "lr": cosine_decay(0.05, 60)}),
    "ClippedAdam": (slope, {"optimizer": "clippedadam"}),
    "momentum": (slope, {"optimizer": partial(torch.optim.SGD, momentum=0.9, nesterov=True), "lr": 1e-4}),
}


COMPILED_HERE = (
    "two plates, a scale",
    "constrained parameters, mask, factor",
    "Gamma and Dirichlet",
    "amortised, mini-batches",
    "Bernoulli masks",
    "filled in place",
    "particles",
)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in COMPILED_HERE else pytest.mark.slow) for k in KINDS])
def test_same_noise_same_losses(kind):
    build, options = KINDS[kind]
    check(*build(), **options)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in COMPILED_HERE])
def test_the_recorded_step_has_the_same_losses(interpreted, kind):
    """What is compiled, run by torch: the recording, the particles and the optimiser, without a compiler."""
    build, options = KINDS[kind]
    check(*build(), **options)


def test_more_planar_layers_are_no_more_operators():
    stream = RandomStream.seeded(0)

    def operators(layers):
        model, guide, args = line(partial(guides.planar_flow, layers=layers))
        bound_model = BoundModel.start(model, guide, args, stream, CPU, torch.float32)
        return CompiledEngine(SVIProblem.on(bound_model, InMemory(args), particles=32), stream).operators

    assert operators(64) == operators(16) < 400


@pytest.mark.parametrize(("particles", "last"), [(32, True), (8, False)])
def test_few_numbers_and_many_particles_lie_side_by_side(particles, last):
    model, guide, args = line(planar_flow)
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(model, guide, args, stream, CPU, torch.float32)
    assert CompiledEngine(SVIProblem.on(bound_model, InMemory(args), particles=particles), stream).step.last is last


@pytest.mark.slow
def test_float32_stays_close_to_eager():
    check(bnn_regression, mean_field_normal(bnn_regression), (X, Y), dtype=torch.float32, rtol=1e-4)


def test_other_noise_gives_other_losses():
    """The check above has teeth: one number of noise changed is seen."""
    with pytest.MonkeyPatch.context() as patch:
        whole = ReplayRandomOps.__init__

        def disturbed(self, values):
            whole(self, [v if v is None or v.dim() else v + 1e-6 for v in values])

        patch.setattr(ReplayRandomOps, "__init__", disturbed)
        with pytest.raises(AssertionError, match="not close"):
            check(*by_hand())


def test_steps_on_a_device_counter_are_the_same_steps():
    """The class whose steps a CUDA graph replays, here without the graph."""
    from inference.engine.compiler.cuda_graph import ReplayedStep

    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(
        linear_regression, mean_field_normal(linear_regression), (X, Y), stream, CPU, torch.float32
    )
    engine = CompiledEngine(SVIProblem.on(bound_model, InMemory((X, Y))), stream)
    first, second = engine.init(stream), None
    rows = engine._rows(0, engine.step.noise(50), 50)
    ours = engine.machine.run(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "inference.engine.compiled.executable", lambda module, inputs, at, _: ReplayedStep(module, inputs, at, 100)
        )
        second = engine.init(stream)
    torch.testing.assert_close(engine.machine.run(rows), ours, rtol=1e-4, atol=0)
    torch.testing.assert_close(second.flat_params, first.flat_params, rtol=1e-4, atol=1e-6)
