"""Many fits in one program: each finds what it would find alone, and ends for its own reasons."""

from functools import partial

import cloudpickle
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn

import inference.svi.fitting_many
from guides import bernoulli_dropout, mean_field_normal
from inference import FitsFailed, NonFinite, fit, fit_many
from inference.engine.batched.runner import Lane, batch_width
from inference.engine.tracing.random_ops import coins
from inference.utils.random_state import RandomStream
from ppl_models import DropoutNetwork

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 2, generator=GENERATOR, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5 * torch.randn(60, generator=GENERATOR, dtype=torch.float64)
OPTIONS = {"engine": "compiled", "progress": False, "dtype": "float64"}


def scaled(x, y, *, weight=1.0, prior=1.0):
    """A regression with hyper-parameters that are a scalar of an operator and a constant."""
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), torch.tensor(prior)).to_event(1))
    pyro.factor("pull", -0.5 * weight * slopes.square().sum())
    with pyro.plate("data", len(x)):
        rows = pyro.subsample(x, event_dim=1)
        pyro.sample("y", dist.Normal(rows @ slopes, 0.5), obs=pyro.subsample(y, event_dim=0))


def beside(fits, **options):
    """The posteriors made at once and those of each call alone."""
    together = fit_many(fits, **{**OPTIONS, **options})
    return together, [call(**{**OPTIONS, **options, **call.keywords}) for call in fits]


def differ(together, alone):
    """The largest difference of losses, and of parameters, relative to the largest number."""
    worst = 0.0
    for one, other in zip(together, alone, strict=True):
        ours, theirs = torch.tensor(one.losses), torch.tensor(other.losses)
        if len(ours) != len(theirs):
            return float("inf")
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
        for name, value in other.unconstrained_params.items():
            mine = one.unconstrained_params[name]
            worst = max(worst, float((mine - value).abs().max() / (1 + value.abs().max())))
    return worst


def splits(count):
    return [(X[i : i + 40], Y[i : i + 40]) for i in range(count)]


MODELS = [partial(scaled, weight=weight, prior=prior) for weight, prior in ((1.0, 1.0), (0.3, 1.0), (1.0, 2.0))]


@pytest.fixture
def lanes(monkeypatch):
    """The fits that ran together."""
    seen, end = [], Lane.end

    def ending(lane, *args):
        seen.append(lane)
        end(lane, *args)

    monkeypatch.setattr(Lane, "end", ending)
    return seen


def test_fits_of_other_data_seeds_numbers_and_steps_find_what_each_finds_alone(lanes, interpreted):
    """Constants that are 0 and 1 in one fit only, numbers in operators, mini-batches, step sizes, lengths."""
    guides = [mean_field_normal(model) for model in MODELS]
    fits = [
        partial(fit, MODELS[m], guides[m], *split, seed=m + i, lr=0.02 * (i + 1), steps=30 + 15 * i)
        for m in range(3)
        for i, split in enumerate(splits(2))
    ]
    together, alone = beside(fits, batch_size=7)
    assert differ(together, alone) < 1e-9
    assert len(lanes) == 6
    assert len({one.losses[20] for one in together}) == 6


def test_fits_that_draw_the_same_noise_are_caught(interpreted, monkeypatch):
    """The control of the test above: each fit drawing what the first one draws."""
    guide = mean_field_normal(scaled)
    fits = [partial(fit, scaled, guide, X, Y, seed=seed) for seed in range(2)]
    monkeypatch.setattr(Lane, "check", lambda *args: None)
    noise = Lane.noise
    monkeypatch.setattr(Lane, "noise", lambda lane, steps, stream=None: noise(lane, steps, RandomStream.seeded(0)))
    assert differ(*beside(fits, steps=20, lr=0.02)) > 1e-3


def test_steps_and_ends_that_are_found_are_those_of_each_fit(lanes):
    """One program for all, compiled; each fit looks at its own losses, and they end at other steps."""
    guide = mean_field_normal(narrow)
    fits = [partial(fit, narrow, guide, *splits(2)[i % 2], seed=i, steps=4000 + 1000 * i) for i in range(4)]
    together, alone = beside(fits, optimizer="auto", init="prior")
    assert differ(together, alone) < 1e-9
    assert [one.stop_reason for one in together] == [one.stop_reason for one in alone]
    assert len(lanes) == 4
    assert len({len(one.losses) for one in together}) > 1


def test_fits_from_a_searched_start_have_coordinates_of_their_own(lanes, interpreted):
    guide = mean_field_normal(scaled)
    fits = [partial(fit, scaled, guide, *split, seed=1) for split in splits(2)]
    assert differ(*beside(fits, steps=150, optimizer="auto")) < 1e-9
    assert len(lanes) == 2


def test_dropout_networks_of_other_rates_in_matrix_products(lanes, interpreted):
    """Draws of other distributions, Bernoulli masks a row, in a network too wide for vectors along the fits."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(2, 70), nn.Tanh(), nn.Dropout(p), nn.Linear(70, 1)) for p in (0.1, 0.4)]
    models = [DropoutNetwork(net, noise=noise) for net, noise in zip(nets, (0.5, 0.8), strict=True)]
    guides = [bernoulli_dropout(model) for model in models]
    fits = [partial(fit, m, g, *split) for split in splits(2) for m, g in zip(models, guides, strict=True)]
    together, alone = beside(fits, steps=20, batch_size=32, lr=0.01, dtype="float32")
    assert differ(together, alone) < 1e-5
    assert len(lanes) == 4


def test_restarts_run_together_and_the_best_is_kept(lanes, interpreted, monkeypatch):
    guide = mean_field_normal(scaled)
    options = {**OPTIONS, "steps": 40, "lr": 0.02, "restarts": 3, "particles": 2}
    together = fit(scaled, guide, X, Y, **options)
    assert len(lanes) == 3
    monkeypatch.setattr("inference.svi.restarts.Restarts.can_join", False)
    alone = fit(scaled, guide, X, Y, **options)
    assert together.record.starts == pytest.approx(alone.record.starts, rel=1e-9)
    assert len(set(together.record.starts)) == 3
    assert differ([together], [alone]) < 1e-9


def narrow(x, y):
    """A model whose density ends where a large step leads."""
    place = pyro.sample("place", dist.Normal(0.0, 1.0))
    pyro.factor("edge", torch.log(4 - place))
    pyro.sample("y", dist.Normal(place, 1.0).expand([len(y)]).to_event(1), obs=y)


def test_a_fit_that_fails_leaves_the_others_alone(lanes, interpreted):
    guide = mean_field_normal(narrow)
    fits = [partial(fit, narrow, guide, X, Y, seed=seed, lr=lr) for seed, lr in enumerate((0.01, 30.0, 0.01))]
    with pytest.raises(FitsFailed, match=r"1 of 3 fits failed, the first, number 1, with: .*'edge'") as failed:
        fit_many(fits, **OPTIONS, steps=120)
    with pytest.raises(NonFinite) as alone:
        fits[1](**OPTIONS, steps=120)
    error = failed.value.errors[1]
    assert (str(error), error.step, error.site) == (str(alone.value), alone.value.step, alone.value.site)
    assert error.posterior.losses == pytest.approx(alone.value.posterior.losses, rel=1e-9)
    kept = failed.value.posteriors
    assert kept[1] is None
    assert differ([kept[0], kept[2]], [fits[i](**OPTIONS, steps=120) for i in (0, 2)]) < 1e-9
    assert len(lanes) == 3


class Remembering(PyroModule):
    """A guide that keeps the mean of the data it was first called with, where nobody sees it."""

    def __init__(self):
        super().__init__()
        self.centre = PyroParam(torch.zeros(2, dtype=torch.float64))
        self._kept = []

    def forward(self, x, y):
        if not self._kept:
            self._kept.append(y.mean())
        pyro.sample("slopes", dist.Normal(self.centre + self._kept[0], 0.1).to_event(1))


def test_a_guide_that_keeps_something_of_its_data_is_found_out(interpreted):
    guide = Remembering()
    fits = [partial(fit, scaled, guide, *split, seed=1, lr=0.01, steps=20) for split in splits(2)]
    with pytest.warns(UserWarning, match="1 fits run one by one: their guide keeps something of its data"):
        together = fit_many(fits, **OPTIONS)
    assert differ(together, [call(**OPTIONS) for call in fits]) < 1e-9


def test_fits_of_several_shapes_are_jobs_of_their_own(interpreted, monkeypatch):
    """As joblib sends them: in bytes, there and back; guides of Pyro's lose their models on the way."""
    sent = []

    def spread(run, items, n_jobs):
        sent.extend(len(item) for item in items)
        return [cloudpickle.loads(cloudpickle.dumps(run(cloudpickle.loads(cloudpickle.dumps(item))))) for item in items]

    monkeypatch.setattr(inference.svi.fitting_many, "spread", spread)
    monkeypatch.setattr(inference.svi.fitting_many, "jobs_at_once", lambda n_jobs: n_jobs)
    guide = mean_field_normal(scaled)
    fits = [partial(fit, scaled, guide, X[:n], Y[:n], seed=seed) for n in (30, 40) for seed in range(2)]
    with pytest.warns(UserWarning, match=r"2 forms, 2, 2 of each, as one has a constant of shape \(30"):
        together = fit_many(fits, n_jobs=2, **OPTIONS, steps=30, lr=0.01)
    assert sent == [2, 2]
    assert differ(together, [call(**OPTIONS, steps=30, lr=0.01) for call in fits]) < 1e-9


@pytest.mark.slow
def test_several_shapes_in_processes_of_loky():
    guide = mean_field_normal(scaled)
    fits = [partial(fit, scaled, guide, X[:n], Y[:n], seed=seed) for n in (30, 40) for seed in range(2)]
    with pytest.warns(UserWarning, match="2 forms"):
        together = fit_many(fits, n_jobs=2, **OPTIONS, steps=250, lr=0.02)
    assert differ(together, [call(**OPTIONS, steps=250, lr=0.02) for call in fits]) < 1e-9


@pytest.mark.parametrize(
    ("fits", "error", "words"),
    [
        ([], ValueError, "fits is empty"),
        ([fit], TypeError, "fit number 0 is .*partial"),
        ([partial(fit, scaled, None, X, Y, callbacks=[print])], ValueError, "number 0 has callbacks="),
        ([partial(fit, scaled, None, X, Y, steps=0)], ValueError, "fit number 0: steps"),
    ],
)
def test_what_is_unfit_is_said_with_its_number(fits, error, words):
    with pytest.raises(error, match=words):
        fit_many(fits)


def test_coins_fall_as_often_as_they_should():
    """Within four standard errors, at a p too that the 16 bits drawn first do not tell from 0."""
    torch.manual_seed(0)
    probs = torch.tensor([0.0, 0.3 / 2**16, 0.005, 0.5, 0.95, 1.0], dtype=torch.float64)
    count = 4_000_000
    heads = coins(probs, count).sum(0)
    assert ((heads - count * probs).abs() <= 4 * (count * probs * (1 - probs)).sqrt()).all()


def test_slabs_fill_the_threads_and_stay_small():
    assert batch_width(lanes=32, largest=400, noise=10**5, threads=1) == 32
    assert batch_width(lanes=32, largest=400, noise=10**5, threads=2) == 16
    assert batch_width(lanes=240, largest=6400, noise=3 * 10**6, threads=2) == 8
    assert batch_width(lanes=240, largest=6400, noise=10**8, threads=2) == 2
    assert batch_width(lanes=3, largest=6400, noise=10**5, threads=2) == 3
