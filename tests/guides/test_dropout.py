"""Dropout as a Bernoulli guide: named masks, the paper's objective, functions rather than noise."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from guides import bernoulli_dropout, mean_field_normal
from inference import fit, load
from inference.model.bound_model import BoundModel, set_training
from inference.model.elbo import loss
from inference.utils.random_state import RandomStream
from ppl_models import DropoutCNN, DropoutNetwork, DropoutRegression, Scaling, linear_regression
from ppl_models.data.datasets import digits

X = torch.linspace(-1, 1, 30).reshape(-1, 1)
Y = torch.sin(3 * X[:, 0])


def network(outputs=1, p=0.3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(1, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, outputs))


def fitted(learned=False, **options):
    model = DropoutNetwork(network(), noise=0.2, length_scale=0.5)
    guide = bernoulli_dropout(model, learned=learned)
    return fit(model, guide, X, Y, progress=False, **{"steps": 200, **options})


@pytest.mark.parametrize("per_row", [True, False])
def test_the_elbo_is_the_papers_objective(per_row):
    """Σ log N(y; f, σ) − Σ k l²/2 ‖M‖² − Σ l²/2 ‖m‖², with the paper's M = W/k, written out for the masks drawn."""
    noise, length, keeps = 0.2, 0.7, {1: 0.9, 4: 0.7}
    net = network().double()
    model = DropoutNetwork(net, noise=noise, length_scale=length)
    guide = bernoulli_dropout(model, per_row=per_row)
    args = (X.double(), Y.double())
    bound_model = BoundModel.start(model, guide, args, RandomStream.seeded(0), torch.device("cpu"), torch.float64)
    set_training(bound_model.guide, True)
    with torch.no_grad(), bound_model.running(bound_model.params.flatten(), RandomStream.seeded(3)):
        found = loss(model, bound_model.guide, args, 1, True)[0]
    with bound_model.running(bound_model.params.flatten(), RandomStream.seeded(3)):
        masks = poutine.trace(bound_model.guide).get_trace(*args).nodes
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
    """Over 1,000 draws the two means agree within 5 standard errors of their difference."""
    values = {}
    model = DropoutNetwork(network(), noise=0.2)
    for per_row in (True, False):
        guide = bernoulli_dropout(model, per_row=per_row)
        bound_model = BoundModel.start(model, guide, (X, Y), RandomStream.seeded(0), torch.device("cpu"), torch.float32)
        set_training(bound_model.guide, True)
        with torch.no_grad(), bound_model.running(bound_model.params.flatten(), RandomStream.seeded(1)):
            values[per_row] = torch.stack([loss(model, bound_model.guide, (X, Y), 1, True)[0] for _ in range(1000)])
    error = math.sqrt(sum(v.var() / 1000 for v in values.values()))
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


def test_fresh_masks_for_each_row_are_not_functions():
    """Where asked for: the rows of a draw differ though they are the same; means agree within their errors."""
    posterior = fitted()
    same = X[:1].expand(200, 1)
    apart = posterior.predict(same, draws=100, per_row=True)
    together = posterior.predict(same, draws=2000)
    assert apart.draws.std(1).min() > 0.01
    assert together.draws.std(1).max() < 1e-6
    spread = float(apart.draws.std())
    assert abs(apart.draws.mean() - together.draws[:, 0].mean()) < 5 * spread * math.sqrt(1 / 20_000 + 1 / 2000)
    assert spread == pytest.approx(float(together.draws[:, 0].std()), rel=0.2)
    parts = posterior.predict(same, draws=100, per_row=True, batch_size=30)
    assert parts.draws.shape == (100, 200)
    assert abs(parts.draws.mean() - apart.draws.mean()) < 5 * spread * math.sqrt(2 / 20_000)


def test_fresh_masks_are_for_guides_that_have_masks():
    posterior = fit(linear_regression, mean_field_normal(linear_regression), X, Y, steps=5, progress=False)
    with pytest.raises(ValueError, match="per_row is for bernoulli_dropout"):
        posterior.predict(X, per_row=True)


def test_the_same_functions_at_any_batch_size_and_what_comes_before_the_masks_is_done_once():
    """The rows that reach the first layer, and those that reach the one behind the first mask."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    model = DropoutNetwork(net, noise=0.2)
    posterior = fit(model, bernoulli_dropout(model), X, Y, steps=20, progress=False)
    rows = []
    model.net[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    whole = posterior.predict(X, draws=40, seed=1).draws
    assert sum(rows) == 30
    for size in (1, 7, 30):
        rows.clear()
        parts = posterior.predict(X, draws=40, seed=1, batch_size=size).draws
        torch.testing.assert_close(parts, whole)
        assert sum(rows) == 30
        assert max(rows) <= size


def test_learned_keep_probabilities_have_the_paper_s_objective():
    """−ELBO = −Σ log N(y; f, σ) + decay at the mean of the masks + KL(Bernoulli(k) ‖ Bernoulli(k₀)) for each unit."""
    noise, length, before = 0.2, 0.7, {1: 0.9, 4: 0.7}
    net = network().double()
    model = DropoutNetwork(net, noise=noise, length_scale=length)
    args = (X.double(), Y.double())
    guide = bernoulli_dropout(model, learned=True)
    bound_model = BoundModel.start(model, guide, args, RandomStream.seeded(0), torch.device("cpu"), torch.float64)
    assert not bound_model.score_function_sites
    set_training(bound_model.guide, True)
    learned = {1: 0.6, 4: 0.8}
    values = bound_model.params.constrained(bound_model.params.flatten())
    values |= {
        "keep.mask.0": torch.tensor(0.6, dtype=torch.float64),
        "keep.mask.3": torch.tensor(0.8, dtype=torch.float64),
    }
    flat = bound_model.params.unconstrained(values)
    with bound_model.running(flat, RandomStream.seeded(3)):
        found = loss(model, bound_model.guide, args, 1, True)[0]
    with bound_model.running(flat, RandomStream.seeded(3)):
        nodes = poutine.trace(bound_model.guide).get_trace(*args).nodes
    masks = {1: nodes["mask.0"]["value"], 4: nodes["mask.3"]["value"]}
    assert ((masks[4] > 0.01) & (masks[4] < 0.99)).any()
    w, m = ({i: getattr(net[i], name).detach() for i in before} for name in ("weight", "bias"))
    hidden = torch.relu((args[0] * masks[1] / 0.9) @ w[1].T + m[1])
    f = ((hidden * masks[4] / 0.7) @ w[4].T + m[4])[:, 0]
    fits = dist.Normal(f, noise).log_prob(args[1]).sum()
    decay = sum(masks[i].mean() * (w[i] / k).square().sum() + m[i].square().sum() for i, k in before.items())
    kl = sum(
        len(w[i][0]) * (k * math.log(k / before[i]) + (1 - k) * math.log((1 - k) / (1 - before[i])))
        for i, k in learned.items()
    )
    expected = (length**2 / 2 * decay + kl - fits).detach()
    assert float(found.detach()) == pytest.approx(float(expected), abs=1e-10)


def test_more_data_makes_it_keep_more():
    """Where data are few and noisy, masks pay for what they save; where they are many, for what they blur."""
    keep = {}
    for rows in (20, 500):
        torch.manual_seed(0)
        x = torch.linspace(-1, 1, rows).reshape(-1, 1)
        y = torch.sin(3 * x[:, 0]) + 0.3 * torch.randn(rows)
        net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1))
        model = DropoutNetwork(net, noise=0.3)
        guide = bernoulli_dropout(model, learned=True)
        posterior = fit(model, guide, x, y, steps=500, lr=0.05, engine="eager", progress=False)
        keep[rows] = float(posterior.params["keep.mask.2"])
        drawn = posterior.sample(2000)["mask.2"]
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        assert abs(drawn.mean() - keep[rows]) < 5 * math.sqrt(0.25 / 40_000)
    assert keep[500] > keep[20] + 0.05


def test_the_networks_that_have_a_name():
    data = digits()
    model = DropoutCNN((8, 8), hidden=30, brightest=16)
    posterior = fit(model, bernoulli_dropout(model), data.x, data.y, steps=30, batch_size=50, progress=False)
    assert {n: tuple(v.shape) for n, v in posterior.sample(3).items()} == {
        "mask.10": (3, 1, 30),
        "mask.13": (3, 1, 30),
    }
    images = torch.tensor(data.x[:5], dtype=torch.float32)
    flat = posterior.predict(images, draws=4).draws
    assert flat.shape == (4, 5, 10)
    assert posterior.bound_model.observed[0].shape == (1797,)
    with pytest.raises(ValueError, match="at least 8 × 8"):
        DropoutCNN((6, 6))


def test_the_regression_network_speaks_in_the_units_of_y():
    x, y = 100 + 20 * X, 5000 + 900 * Y
    torch.manual_seed(0)
    model = DropoutRegression(1, p=0.02, scaling=Scaling.of(x, y))
    posterior = fit(model, bernoulli_dropout(model), x, y, steps=600, lr=0.02, engine="eager", progress=False)
    p = posterior.predict(x, draws=100)
    assert (p.mean - y).square().mean().sqrt() < 0.3 * y.std()
    noise = float(posterior.params["noise"])
    assert 0 < noise < 0.5 * float(y.std())
    torch.testing.assert_close(p.noise, torch.full((30,), noise**2))


@pytest.mark.slow
def test_it_learns_in_both_engines_and_with_mini_batches():
    for options in ({"engine": "eager"}, {"engine": "compiled"}, {"engine": "compiled", "batch_size": 10}):
        posterior = fitted(steps=800, lr=0.01, **options)
        assert posterior.losses[-100:].mean() < posterior.losses[:20].mean() - 15, options


@pytest.mark.slow
def test_both_engines_learn_the_same_keep_probabilities():
    """The two draw other numbers; over the last steps the probabilities move by about 0.02."""
    one, two = (fitted(learned=True, steps=1000, lr=0.01, engine=engine) for engine in ("eager", "compiled"))
    for name in ("keep.mask.0", "keep.mask.3"):
        assert abs(one.params[name] - two.params[name]) < 0.1
    assert one.params["keep.mask.0"] > 0.93


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


class Shared(nn.Module):
    """One dropout layer used twice, on other numbers of units, and once more under another name."""

    def __init__(self):
        super().__init__()
        self.drop = self.again = nn.Dropout(0.3)
        self.first, self.second, self.last = nn.Linear(1, 6), nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.again(self.drop(self.second(self.drop(self.first(x).relu())).relu())))


def test_a_layer_that_is_used_twice_has_a_mask_for_each_use():
    model = DropoutNetwork(Shared(), noise=0.2)
    posterior = fit(model, bernoulli_dropout(model), X, Y, steps=20, progress=False)
    shapes = {name: tuple(value.shape[2:]) for name, value in posterior.sample(3).items()}
    assert shapes == {"mask.drop": (6,), "mask.drop.2": (4,), "mask.again": (4,)}
    torch.testing.assert_close(posterior.predict(X, draws=5, batch_size=7).draws, posterior.predict(X, draws=5).draws)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DropoutNetwork(nn.Linear(1, 1)), "Linear has no nn.Dropout"),
        (
            lambda: DropoutNetwork(nn.Sequential(nn.Dropout2d(), nn.Linear(1, 1))),
            "0 is Dropout2d, with dropout of its own: only nn.Dropout",
        ),
        (
            lambda: DropoutNetwork(nn.Sequential(nn.Dropout(), nn.Linear(1, 2), nn.BatchNorm1d(2))),
            "2 is BatchNorm1d.*LayerNorm",
        ),
        (lambda: DropoutNetwork(nn.Sequential(nn.Dropout(), nn.LSTM(1, 2, 2, dropout=0.1))), "1 is LSTM"),
        (lambda: DropoutNetwork(network(), noise=0), "noise is 0"),
        (lambda: DropoutNetwork(network(), noise="unknown"), "noise is 'unknown'"),
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
