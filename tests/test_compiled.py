"""The compiled engine against the eager one: same noise, same numbers, for every kind of model."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints

from guides import mean_field_normal
from inference import cosine_decay, fit
from inference.compiled import CompiledEngine
from inference.draws import Replay
from inference.eager import EagerEngine
from inference.isolation import RandomStream
from inference.program import Program
from inference.svi import worth_compiling
from inference.task import Task
from ppl_models import bnn_regression, linear_regression

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def losses_of_both(model, guide, args, steps=200, dtype=torch.float64, batch_size=None, **options):
    """Losses of the compiled and of the eager engine, fed the same random numbers."""
    args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    stream = RandomStream.seeded(0)
    program = Program.start(model, guide, args, stream, CPU, dtype)
    task = Task.of(program, args, batch_size, **options)
    compiled = CompiledEngine(task, stream)
    state = compiled.init(stream)
    eager = EagerEngine(task)
    start = eager.init(stream)
    ours, theirs = [], []
    with program.running(start.flat.detach(), stream, start.grad):
        rows = compiled._rows(0, steps)
        random_state = torch.get_rng_state()
        ours = compiled.machine.run(rows)
        torch.set_rng_state(random_state)
        noise = [
            dict(zip(compiled.row_names, rows, strict=True))[f"noise{i}"] for i in range(len(compiled.step.groups))
        ]
        for i in range(steps):
            values = [value for run in compiled.step.replayed(noise, i) for value in run]
            with Replay(values):
                theirs.append(eager._step(start, i))
    return ours, torch.stack(theirs), state.flat, start.flat.detach()


def check(*case, rtol=1e-10, **options):
    ours, theirs, theta, reference = losses_of_both(*case, **options)
    assert torch.isfinite(theirs).all() and len(theirs.unique()) > 1
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    torch.testing.assert_close(theta, reference, rtol=100 * rtol, atol=rtol)


X = torch.linspace(-1, 1, 40).reshape(-1, 1)
Y = torch.cos(3 * X[:, 0])
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
    "planar flow": (
        partial(
            line,
            lambda model: autoguide.AutoNormalizingFlow(
                model, partial(pyro.distributions.transforms.iterated, 3, pyro.distributions.transforms.planar)
            ),
        ),
        {},
    ),
    "inverse autoregressive flow": (partial(line, partial(autoguide.AutoIAFNormal, hidden_dim=[8])), {}),
    "particles": (eight_schools, {"particles": 4}),
    "particles that vmap cannot batch": (in_place, {"particles": 2}),
    "batch_size": (partial(line, mean_field_normal), {"batch_size": 7}),
    "AdamW, a schedule": (partial(line, mean_field_normal), {"optimizer": "adamw", "lr": cosine_decay(0.05, 200)}),
    "ClippedAdam": (partial(line, mean_field_normal), {"optimizer": "clippedadam"}),
    "momentum": (
        partial(line, mean_field_normal),
        {"optimizer": partial(torch.optim.SGD, momentum=0.9, nesterov=True), "lr": 1e-4},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_same_noise_same_losses(kind):
    build, options = KINDS[kind]
    check(*build(), **options)
