import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.poutine.subsample_messenger import _Subsample
from scipy import stats

import inference.model.subsampling
from guides import mean_field_normal
from inference import cosine_decay, fit
from inference.engine.eager import EagerEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.model.elbo import log_weight, traces
from inference.utils.random_state import RandomStream
from ppl_models import linear_regression


class Rows(pyro.poutine.messenger.Messenger):
    """Give the data plate exactly these rows."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg):
        if isinstance(msg["fn"], _Subsample):
            msg["value"] = self.rows


def elbo(bound_model, args, model):
    flat_params = bound_model.params.flatten()
    with bound_model.running(flat_params, RandomStream.seeded(3)), torch.no_grad():
        return log_weight(*traces(model, bound_model.guide, args))


def start(model, line):
    stream, args = RandomStream.seeded(0), (line.x.double(), line.y.double())
    return BoundModel.start(model, mean_field_normal(model), args, stream, torch.device("cpu"), torch.float64), args


def test_the_full_elbo_is_the_mean_of_the_mini_batch_elbos(line):
    bound_model, args = start(linear_regression, line)
    full = elbo(bound_model, args, linear_regression)
    batches = [elbo(bound_model, args, Rows(rows)(linear_regression)) for rows in torch.arange(40).split(8)]
    torch.testing.assert_close(torch.stack(batches).mean(), full, rtol=1e-10, atol=0)
    assert torch.stack(batches).std() > 0.1


def test_a_model_that_forgets_the_scale_fails_that_check(line):
    def unscaled(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)) as rows, pyro.poutine.scale(scale=len(rows) / len(x)):
            pyro.sample("y", dist.Normal(w * x[rows, 0], 1.0), obs=y[rows])

    bound_model, args = start(unscaled, line)
    full = elbo(bound_model, args, unscaled)
    batches = [elbo(bound_model, args, Rows(rows)(unscaled)) for rows in torch.arange(40).split(8)]
    assert abs(torch.stack(batches).mean() - full) > 1


def test_each_step_sees_the_asked_number_of_fresh_rows(line):
    seen = []

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)) as rows:
            seen.append(rows)
            pyro.sample("y", dist.Normal(w * x[rows, 0], 1.0), obs=y[rows])

    bound_model, args = start(model, line)
    engine = EagerEngine(SVIProblem.on(bound_model, InMemory(args, 8)))
    state = engine.init(RandomStream.seeded(0))
    seen.clear()
    engine.advance(state, 200)
    assert {len(rows) for rows in seen} == {8}
    counts = torch.cat(seen).bincount(minlength=40)
    # 1,600 rows drawn evenly from 40: a count has mean 40 and sd at most 6.3.
    assert ((counts > 10) & (counts < 70)).all()


def evenness(subsets, rows):
    """The p-value of a χ² test that every subset is as likely."""
    codes = (rows ** np.arange(subsets.shape[1]) * np.sort(subsets, axis=1)).sum(1)
    counts = np.unique(codes, return_counts=True)[1]
    kinds = math.comb(rows, subsets.shape[1])
    return stats.chisquare(np.pad(counts, (0, kinds - len(counts)))).pvalue


@pytest.mark.parametrize("size", [3, 2])
def test_every_subset_of_many_rows_is_as_likely(monkeypatch, size):
    """By both ways for rows that are too many to shuffle: 3 of 11 is more than a quarter, 2 less."""
    monkeypatch.setattr(inference.model.subsampling, "_SHUFFLED", 0)
    torch.manual_seed(0)
    subsets = inference.model.subsampling._subsets(20_000, 11, size).numpy()
    assert (np.diff(np.sort(subsets, axis=1), axis=1) > 0).all()
    assert evenness(subsets, 11) > 1e-4
    shifted = np.random.default_rng(0).integers(0, 11, subsets.shape)
    shifted[:, 1:] = np.where(shifted[:, 1:] == shifted[:, :-1], (shifted[:, 1:] + 1) % 11, shifted[:, 1:])
    assert evenness(shifted[(np.diff(np.sort(shifted, axis=1), axis=1) > 0).all(1)], 11) < 1e-4


def test_subsets_of_very_many_rows():
    torch.manual_seed(0)
    subsets = inference.model.subsampling._subsets(50, 10**9, 1000).numpy()
    assert all(len(set(rows)) == 1000 for rows in subsets)
    assert len(set(inference.model.subsampling._subsets(1, 5000, 1200).numpy()[0])) == 1200
    # 50,000 even draws: the mean of a fraction has sd 0.0013.
    assert abs((subsets / 10**9).mean() - 0.5) < 0.006


@pytest.mark.slow
def test_mini_batches_reach_the_same_posterior(line):
    def run(**options):
        guide = mean_field_normal(linear_regression)
        schedule = cosine_decay(0.03, 2500)
        posterior = fit(linear_regression, guide, line.x, line.y, steps=2500, lr=schedule, progress=False, **options)
        return posterior.sample(2000)

    full, batched = run(), run(batch_size=10)
    for name, draws in full.items():
        # Sub-sampling makes the gradient noisier: a tenth of an sd is 4 of its standard errors here.
        assert abs(batched[name].mean() - draws.mean()) < 0.25 * draws.std()
        assert batched[name].std() / draws.std() == pytest.approx(1, abs=0.25)


def test_a_model_without_such_a_plate_is_told_to_write_one(line):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x[:, 0], 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"plate of 40 rows.*pyro\.subsample"):
        fit(model, mean_field_normal(model), line.x, line.y, batch_size=5, steps=10, progress=False)


def test_no_more_rows_than_a_batch_are_ever_looked_at_together_and_shapes_are_those_of_all():
    seen = []

    def model(x, y=None):
        net = pyro.param("w", torch.zeros(1))
        with pyro.plate("data", len(x)):
            rows = pyro.subsample(x, event_dim=1)
            observed = pyro.subsample(y, event_dim=0) if y is not None else None
            seen.append(len(rows))
            pyro.sample("y", dist.Normal(rows @ net, 1.0), obs=observed)

    def guide(x, y=None):
        """Nothing is latent."""

    x = torch.randn(500, 1)
    posterior = fit(model, guide, x, x[:, 0], steps=3, batch_size=20, engine="eager", progress=False)
    assert max(seen) == 20
    assert posterior.bound_model.observed[0].shape == (500,)
    torch.testing.assert_close(posterior.observed_values()["y"], x[:, 0])
    assert list(posterior.inputs()) == ["x"]
    posterior.predict(x, draws=10, progress=False)
    assert max(seen) == 20


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_an_autoguide_looks_at_all_rows_only_where_they_have_latents(local, nested):
    seen = []

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            rows = pyro.subsample(x, event_dim=1)
            observed = pyro.subsample(y, event_dim=0) if y is not None else None
            seen.append(len(rows))
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if local else 0.0
            pyro.sample("y", dist.Normal(rows @ w + shift, 1.0), obs=observed)

    guide = mean_field_normal(model)
    if nested:
        guide = AutoGuideList(model)
        guide.append(AutoNormal(pyro.poutine.block(model, expose=["w"])))
        if local:
            guide.append(AutoNormal(pyro.poutine.block(model, hide=["w"])))
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    posterior = fit(model, guide, x, x.sum(1), steps=3, batch_size=20, lr=0.01, engine="eager", progress=False)
    if not nested:  # block() hides the plate of the parts of a list
        assert max(seen) == (200 if local else 20)
    shapes = {site.name: site.shape for site in posterior.bound_model.latents}
    assert shapes == {"w": (2,), "shift": (200,)} if local else shapes == {"w": (2,)}
    posterior.bound_model.guide.model(x, x.sum(1))
    assert seen[-1] == 200


@pytest.mark.parametrize("batch_size", [None, 5])
def test_an_impossible_observation_is_named_though_its_row_is_not_in_the_first_batch(batch_size):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            rows = pyro.subsample(x, event_dim=1)
            observed = pyro.subsample(y, event_dim=0) if y is not None else None
            pyro.sample("label", dist.Categorical(logits=rows @ w), obs=observed)

    y = torch.zeros(100, dtype=torch.long)
    y[57] = 3
    with pytest.raises(ValueError, match=r"site 'label' observes 3 at row 57, .*Categorical"):
        fit(model, mean_field_normal(model), torch.ones(100, 1), y, steps=5, batch_size=batch_size, progress=False)
