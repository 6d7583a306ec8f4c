"""Every gradient is the slope of its loss, and one that is not is named."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch import nn
from torch.distributions import constraints

import guides
from inference import check_gradients, fit
from ppl_models import (
    VAE,
    DropoutCNN,
    DropoutNetwork,
    DropoutRegression,
    bnn_regression,
    linear_regression,
    mlp_regression,
    u1,
    u2,
    u3,
    u4,
)

X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] - 0.5 * X[:, 1].square()
IMAGES = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(6) % 3
CONTINUOUS = {
    "linear": (linear_regression, X, Y),
    "bnn": (partial(bnn_regression, hidden=(3,), noise="learned"), X, Y),
    "bnn, heteroscedastic": (partial(bnn_regression, hidden=(3,), noise="heteroscedastic"), X, Y),
    "mlp": (partial(mlp_regression, hidden=(3, 4)), X, Y),
    **{model.__name__: (model,) for model in (u1, u2, u3, u4)},
}
GUIDES = {
    "AutoDelta": AutoDelta,
    "mean_field": guides.mean_field_normal,
    "full_rank": guides.full_rank_normal,
    "low_rank": partial(guides.low_rank_normal, rank=2),
    "planar": partial(guides.planar_flow, layers=3),
    "funnel": guides.funnel_flow,
    "spline": partial(guides.spline_flow, layers=2, bins=4, hidden=[4]),
}


def made(build, *data):
    torch.manual_seed(0)
    return (*build(), *data)


def dropout(model, **options):
    return model, guides.bernoulli_dropout(model, **options)


def net():
    return nn.Sequential(nn.Linear(2, 5), nn.LeakyReLU(0.2), nn.Dropout(0.4), nn.Linear(5, 1))


def vae(**options):
    model = VAE(6, latent=2, hidden=[4], **options)
    return model, guides.amortized_encoder(model)


NETWORKS = {
    "VAE": lambda: made(vae, (IMAGES.reshape(-1, 6) > 0.5).float()),
    "VAE, grey": lambda: made(partial(vae, noise=0.3), IMAGES.reshape(-1, 6)),
    "dropout": lambda: made(lambda: dropout(DropoutNetwork(net(), noise="learned")), X, Y),
    "dropout, learned": lambda: made(lambda: dropout(DropoutNetwork(net(), noise=0.5), learned=True), X, Y),
    "DropoutRegression": lambda: made(lambda: dropout(DropoutRegression(2, hidden=4)), X, Y),
    "DropoutCNN": lambda: made(
        lambda: dropout(DropoutCNN((8, 8), classes=3, brightest=1, hidden=6)), IMAGES.reshape(6, -1), CLASSES
    ),
}


def pairs():
    """Every guide with three kinds of models, and every model with a point, a spread and a flow."""
    wide, usual = ("linear", "bnn", "u1"), ("AutoDelta", "mean_field", "planar")
    return [(model, guide) for model in CONTINUOUS for guide in GUIDES if model in wide or guide in usual]


@pytest.mark.parametrize(("model", "guide"), pairs())
def test_every_guide_of_continuous_latents(model, guide):
    function, *data = CONTINUOUS[model]
    check = check_gradients(function, GUIDES[guide](function), *data, most=16)
    assert check.passed, check.reasons
    assert check.checked == min(16, check.size)


@pytest.mark.parametrize("pair", NETWORKS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_every_guide_of_a_network(pair, batch_size):
    model, guide, *data = NETWORKS[pair]()
    check = check_gradients(model, guide, *data, most=16, batch_size=batch_size, particles=2)
    assert check.passed, check.reasons


class Flipped(torch.autograd.Function):
    """x·w, with the sign of w's gradient wrong."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        return None, -ctx.saved_tensors[0].T @ grad


def by_hand(product=torch.matmul, in_model=lambda b: b, in_guide=lambda loc: loc):
    def model(x, y=None):
        b = in_model(pyro.param("b", torch.tensor(0.3)))
        w = pyro.param("w", torch.tensor([0.5, -0.2]))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(product(x, w) + b + z, 0.7), obs=y)

    def guide(x, y=None):
        loc = in_guide(pyro.param("loc", torch.tensor(0.1)))
        pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.2), constraint=constraints.positive)))

    return model, guide


def test_a_model_without_a_fault_passes():
    check = check_gradients(*by_hand(), X, Y)
    assert check.passed
    assert check.checked == 5
    assert set(check.errors) == {"b", "w", "loc", "scale"}
    assert check.reasons == check.detached == ()


def test_a_wrong_sign_is_named():
    check = check_gradients(*by_hand(product=Flipped.apply), X, Y)
    assert check.failed == ("w",)
    assert check.worst.name == "w"
    assert check.worst.autograd == pytest.approx(-check.worst.difference)
    assert check.worst.error == pytest.approx(2)
    assert check.reasons[0].startswith(f"w[{check.worst.index[0]}]: ")
    assert check.reasons[0].endswith("the opposite sign")


@pytest.mark.parametrize(("fault", "name"), [({"in_model": torch.detach}, "b"), ({"in_guide": torch.detach}, "loc")])
def test_a_parameter_without_a_gradient_is_named(fault, name):
    check = check_gradients(*by_hand(**fault), X, Y)
    assert check.failed == check.detached == (name,)
    assert check.worst.autograd == 0 != check.worst.difference
    assert "it is detached" in check.reasons[0]


def test_a_loss_without_any_gradient_is_not_passed():
    def model(x, y=None):
        b = pyro.param("b", torch.tensor(0.3)).detach()
        pyro.sample("y", dist.Normal(b, 0.7).expand(y.shape).to_event(1), obs=y)

    assert check_gradients(model, lambda x, y=None: None, X, Y).detached == ("b",)


def test_a_parameter_that_the_loss_does_not_use_passes():
    model, guide = by_hand(in_model=torch.zeros_like)
    assert check_gradients(model, guide, X, Y).errors["b"] == 0


def test_a_fault_in_the_operator_of_the_planar_flow_is_found(monkeypatch):
    whole = check_gradients(u1, guides.planar_flow(u1, layers=3))
    backward = torch.ops.kiln.tanh_recurrence_backward
    monkeypatch.setattr("guides.tanh_recurrence._backward", lambda g, h, m: -backward(g, h, m))
    broken = check_gradients(u1, guides.planar_flow(u1, layers=3))
    assert whole.passed
    assert not broken.passed
    assert any("transform" in name for name in broken.failed)


def test_beside_a_kink_a_shorter_step_is_taken():
    """The kink of |b| is 4e-6 away: a step of 1e-5 goes over it."""
    model, guide = by_hand(in_model=torch.abs)
    at = {"b": 4e-6, "w": [0.5, -0.2], "loc": 0.1, "scale": 0.2}
    assert check_gradients(model, guide, X, Y, at=at).passed


def test_it_can_be_asked_at_a_fitted_posterior():
    guide = guides.mean_field_normal(linear_regression)
    posterior = fit(linear_regression, guide, X, Y, steps=300, progress=False)
    assert check_gradients(linear_regression, guide, X, Y, at=posterior.params).passed
    with pytest.raises(ValueError, match="at has"):
        check_gradients(linear_regression, guide, X, Y, at={"loc": 1.0})


def test_of_many_parameters_some_of_each_are_looked_at():
    model = partial(bnn_regression, hidden=(10, 10))
    check = check_gradients(model, AutoNormal(model), X, Y, most=20, seed=3)
    assert check.checked == 20 < check.size
    assert len(check.errors) == 12
    again = check_gradients(model, AutoNormal(model), X, Y, most=20, seed=3)
    assert again == check
    assert check_gradients(model, AutoNormal(model), X, Y, most=20, seed=4) != check


def test_nothing_outside_is_touched():
    """A network that lives in a closure, in single precision, with a gradient of somebody else's."""
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.ones_like(layer.weight)
    before = layer.weight.detach().clone()

    def model(x, y=None):
        pyro.module("layer", layer)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(layer(x)[:, 0] + z, 1.0), obs=y)

    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(1.0))
    state = torch.get_rng_state()
    check = check_gradients(model, AutoNormal(model), X, Y)
    assert check.passed, check.reasons
    assert set(check.errors) >= {"layer$$$weight", "layer$$$bias"}
    assert torch.equal(torch.get_rng_state(), state)
    assert set(pyro.get_param_store()) == {"mine"}
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight.grad, torch.ones_like(before))
    pyro.clear_param_store()


WEIGHTS = torch.tensor([1.0, 2.0])


def test_constants_in_single_precision_do_not_stand_in_the_way():
    """A matrix product needs one type, and a scalar times a vector takes the vector's."""

    def model(x, y=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ WEIGHTS + (z * WEIGHTS).sum(), 1.0), obs=y)

    check = check_gradients(model, guides.mean_field_normal(model, init_loc={"z": 1.0}), X, Y)
    assert check.worst.error < 1e-8


def drawn_from(make):
    def model(y):
        rate = pyro.sample("rate", make(torch.tensor(2.0)))
        pyro.sample("y", dist.Normal(rate, 1.0).expand(y.shape).to_event(1), obs=y)

    def guide(y):
        pyro.sample("rate", make(pyro.param("mean", torch.tensor(2.0), constraint=constraints.positive)))

    return model, guide


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (drawn_from(dist.Poisson), r"\['rate'\] without reparameterisation"),
        (drawn_from(lambda mean: dist.Gamma(mean, 1.0)), "'rate' from Gamma by rejection"),
        (
            (lambda y: pyro.sample("y", dist.Normal(y, 1.0).to_event(1), obs=y), lambda y: None),
            "neither model nor guide",
        ),
        ((lambda y: pyro.factor("f", pyro.param("a", torch.tensor(1.0)).log()), lambda y: None), "the loss is nan"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_the_reason(parts, message):
    with pytest.raises(ValueError, match=message):
        check_gradients(*parts, Y, at={"a": -1.0} if "nan" in message else None)


def line_with_parameters(x, t=None):
    """−log p is (y − t)² up to a constant, y = Wx + b."""
    weight, bias = pyro.param("W", torch.tensor(0.5)), pyro.param("b", torch.tensor(-0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("t", dist.Normal(weight * x + bias, 0.5**0.5), obs=t)


def line_with_flat_priors(x, t=None):
    weight, bias = (pyro.sample(n, dist.ImproperUniform(constraints.real, (), ())) for n in ("W", "b"))
    with pyro.plate("data", len(x)):
        pyro.sample("t", dist.Normal(weight * x + bias, 0.5**0.5), obs=t)


LINES = {
    "parameters": (line_with_parameters, lambda x, t=None: None, ""),
    "AutoDelta": (
        line_with_flat_priors,
        AutoDelta(
            line_with_flat_priors,
            init_loc_fn=init_to_value(
                values={n: torch.tensor(v, dtype=torch.float64) for n, v in (("W", 0.5), ("b", -0.3))}
            ),
        ),
        "AutoDelta.",
    ),
}


@pytest.mark.parametrize(
    ("line", "engine"), [("parameters", "eager"), ("parameters", "compiled"), ("AutoDelta", "eager")]
)
def test_five_steps_of_descent_are_those_done_by_hand(line, engine):
    """W ← W − α 2(y − t)x, b ← b − α 2(y − t), at one point."""
    model, guide, prefix = LINES[line]
    x, t, rate, w, b = 2.0, 3.0, 0.05, 0.5, -0.3
    for steps in range(1, 6):
        error = w * x + b - t
        w, b = w - rate * 2 * error * x, b - rate * 2 * error
        data = (torch.tensor([x]), torch.tensor([t]))
        options = {"optimizer": "sgd", "dtype": torch.float64, "engine": engine, "progress": False}
        posterior = fit(model, guide, *data, steps=steps, lr=rate, **options)
        found = [posterior.unconstrained_params[prefix + name].item() for name in ("W", "b")]
        assert found == pytest.approx([w, b], abs=5e-15)
        assert posterior.losses[-1] == pytest.approx(error**2 + 0.5 * math.log(math.pi), abs=5e-14)
