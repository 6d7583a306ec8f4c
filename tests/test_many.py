"""Many fits in one program: each finds what it would find alone, and ends for its own reasons."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from guides import bernoulli_dropout, mean_field_normal
from inference import FitsFailed, NonFinite, fit, fit_many
from inference.together import Lane
from ppl_models import DropoutRegression, linear_regression

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
    seen = []
    end = Lane.end
    monkeypatch.setattr(Lane, "end", lambda lane, *args: (seen.append(lane), end(lane, *args)))
    return seen


@pytest.mark.parametrize("found", [False, True])
def test_fits_made_at_once_find_what_each_finds_alone(lanes, found):
    """Other seeds, data, constants, numbers in operators, step sizes and lengths; or steps and ends that are found."""
    guides = [mean_field_normal(model) for model in MODELS]
    places = [(m, i, {} if found else {"lr": 0.02 * (i + 1), "steps": 150 + 50 * i}) for m in range(3) for i in range(2)]
    fits = [
        partial(fit, MODELS[m], guides[m], *split, seed=m + i, **own)
        for m, i, own in places
        for split in [splits(2)[i]]
    ]
    together, alone = beside(fits, batch_size=7, steps=2500)
    assert differ(together, alone) < 1e-9
    assert len(lanes) == 6
    assert len({one.losses[-1] for one in together}) == 6
    if found:
        assert [one.stop_reason for one in together] == [one.stop_reason for one in alone]
        assert len({len(one.losses) for one in together}) > 1
