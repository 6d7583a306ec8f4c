"""Fits by several processes: the numbers of one, whatever the shares; errors that all have; nothing waits in vain."""

import os
import signal
import time
import warnings
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import amortized_encoder, mean_field_normal
from inference import Checkpoint, NonFinite, batches, fit
from inference.engine.data_parallel import DataParallel, shard_of
from ppl_models import VAE, linear_regression
from tests.helpers.torchrun import together

ROWS = 21  # of which two processes have 10 and 11, and four 5, 5, 5 and 6
X = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X[-1] *= 10  # so that weights matter
Y = X.sum(1) + X[:, 0].square() / 2
OPTIONS = {"dtype": "float64", "progress": False}
WAYS = {
    "eager, all rows": {"engine": "eager", "steps": 60, "lr": 0.02},
    "eager, 9 rows a step": {"engine": "eager", "steps": 60, "lr": 0.02, "batch_size": 9},
    "eager, a found way": {"engine": "eager", "steps": 1_500},
    "compiled, all rows": {"engine": "compiled", "steps": 250, "lr": 0.02},
    "compiled, 8 rows a step": {"engine": "compiled", "steps": 250, "lr": 0.02, "batch_size": 8},
    "compiled, 9 rows a step": {"engine": "compiled", "steps": 250, "lr": 0.02, "batch_size": 9},
    "compiled, a found way": {"engine": "compiled", "steps": 2_500},
    "compiled, 3 particles": {"engine": "compiled", "steps": 250, "lr": 0.02, "batch_size": 9, "particles": 3},
}
QUICK = ["eager, all rows", "eager, 9 rows a step", "compiled, 8 rows a step"]
CLOSE = 1e-6  # nats, of losses of up to 10⁴


def line(x, y=None):
    return linear_regression(x, y, noise=1.0)


def losses(way, **changes):
    return fit(line, mean_field_normal(line), X, Y, **OPTIONS, **WAYS[way] | changes).losses


def streamed(engine="eager"):
    """Rows that are read a batch at a time."""
    options = {"steps": 60, "lr": 0.02, "batch_size": 9, "engine": engine}
    return fit(line, mean_field_normal(line), batches(X.numpy(), Y.numpy()), **OPTIONS, **options).losses


def rows_of_their_own(engine, steps, **more):
    """−ELBO of an autoencoder whose parameters stay where they are."""
    torch.manual_seed(1)
    model = VAE(2, latent=2, hidden=[3], noise=1.0).double()
    options = {"optimizer": "sgd", "lr": 1e-12, "steps": steps, "engine": engine}
    return fit(model, amortized_encoder(model), X, **OPTIONS, **options, **more)


def without_a_plate(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def without_subsample(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def as_many_columns_as_rows(x, y=None):
    """A horseshoe's plate has as many places as there are rows, and is none over them."""
    with pyro.plate("columns", ROWS):
        w = pyro.sample("w", dist.Normal(torch.zeros(ROWS, dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        rows, observed = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
        pyro.sample("y", dist.Normal(rows @ w[:2] + w[2:].sum(), 1.0), obs=observed)


def square():
    guide, options = mean_field_normal(as_many_columns_as_rows), {"steps": 20, "lr": 0.1, "engine": "eager"}
    return fit(as_many_columns_as_rows, guide, X, Y, **OPTIONS, **options).losses


def breaks_at_the_last_row(x, y=None):
    w = pyro.param("w", torch.tensor(1.0, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        rows, observed = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
        loc = torch.where(rows[:, 0] == x[-1, 0], w.log(), w)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=observed)


def nothing(x, y=None):
    """A guide without latents."""


def at_call(number, rank, act):
    """The line, which does something at the process ``rank`` when it runs for the n-th time."""
    calls = [0]

    def model(x, y=None):
        calls[0] += 1
        if calls[0] == number and torch.distributed.get_rank() == rank:
            act()
        return line(x, y)

    return model


def stumble():
    raise ValueError("no more of this")


def said(kind, *args, **options):
    """The error that a fit must end with, in words."""
    with pytest.raises(kind) as caught:
        fit(*args, **OPTIONS, **options)
    return str(caught.value)


def with_checkpoint(folder, steps, resume=False):
    return losses("eager, 9 rows a step", steps=steps, checkpoint=Checkpoint(folder, every=10), resume=resume)


@contextmanager
def even_weights():
    with mock.patch.object(DataParallel, "weight", property(lambda self: 1 / self.group.count)):
        yield


@contextmanager
def noise_apart():
    checked = DataParallel.checked
    with mock.patch.object(
        DataParallel, "checked", lambda *args: type(args[0])(**vars(checked(*args)) | {"own": True})
    ):
        yield


def all_checks(folder):
    def work(rank):
        out = {way: losses(way) for way in QUICK}
        out["square"], out["streamed"] = square(), streamed()
        with even_weights():
            out["even weights"] = losses("eager, 9 rows a step")
        with noise_apart():
            out["noise apart"] = losses("eager, 9 rows a step")
        out["first part"] = with_checkpoint(folder / "kept", 40)
        out["rows"] = rows_of_their_own("eager", 300).losses
        with even_weights():
            out["rows, even weights"] = rows_of_their_own("eager", 60).losses
        out["posterior"] = fit(line, mean_field_normal(line), X, Y, steps=5, lr=0.1, **OPTIONS).sample(1)["weights"]
        guide = mean_field_normal(line)
        out["errors"] = np.array(
            [
                said(ValueError, without_a_plate, mean_field_normal(without_a_plate), X, Y, steps=5),
                said(ValueError, without_subsample, mean_field_normal(without_subsample), X, Y, steps=5),
                said(ValueError, line, guide, X, Y, steps=5, seed=rank),
                said(ValueError, line, guide, X[:1], Y[:1], steps=5),
                said(ValueError, line, guide, X, Y, steps=50, checkpoint=folder / "kept"),
                said(NonFinite, breaks_at_the_last_row, nothing, X, Y - 50, steps=9, optimizer="sgd", lr=1.0),
            ]
        )
        told = at_call(30, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with warnings.catch_warnings(action="ignore"):
            posterior = fit(told, mean_field_normal(told), X, Y, steps=10_000, lr=0.01, engine="eager", **OPTIONS)
        out["told"], out["told why"] = posterior.losses, np.array(posterior.stop_reason)
        began, stumbling = time.monotonic(), at_call(30, 1, stumble)
        kind = ValueError if rank else ConnectionError
        options = {"steps": 90, "engine": "eager", "restarts": 2}  # it must not begin again alone
        out["stumbled"] = np.array(said(kind, stumbling, mean_field_normal(stumbling), X, Y, **options))
        out["seconds"] = np.array(time.monotonic() - began)
        return out

    return work


@pytest.fixture(scope="module")
def pair(own_cache, tmp_path_factory):
    """What two processes found, and the folder with their checkpoint."""
    folder = tmp_path_factory.mktemp("pair")
    losses("compiled, 8 rows a step")  # leaves the compiled header of all programs
    return together(2, folder, all_checks(folder)), folder


def apart(found, alone):
    assert found.shape == alone.shape
    return np.abs(found - alone).max()


@pytest.mark.parametrize("way", QUICK)
def test_two_processes_have_the_losses_of_one(pair, way):
    (first, second), _ = pair
    assert (first[way] == second[way]).all()
    assert apart(first[way], losses(way)) < CLOSE


def test_batches_that_are_read_are_shared_too(pair):
    assert apart(pair[0][0]["streamed"], streamed()) < CLOSE


def test_a_plate_that_has_as_many_places_by_chance_stays_whole(pair):
    assert apart(pair[0][0]["square"], square()) < CLOSE


@pytest.mark.parametrize("broken", ["even weights", "noise apart"])
def test_without_weights_or_common_noise_they_have_not(pair, broken):
    (first, _), _ = pair
    assert apart(first[broken], losses("eager, 9 rows a step")) > 1e3 * CLOSE


def test_all_have_the_same_posterior(pair):
    (first, second), _ = pair
    assert (first["posterior"] == second["posterior"]).all()


def test_one_process_goes_on_where_two_were(pair):
    (first, _), folder = pair
    whole = losses("eager, 9 rows a step")
    assert apart(first["first part"], whole[:40]) < CLOSE
    assert apart(with_checkpoint(folder / "kept", 60, resume=True), whole) < CLOSE


def off(found, alone):
    """How many of its standard errors the difference of two means is."""
    return abs(found.mean() - alone.mean()) / np.sqrt(found.var() / len(found) + alone.var() / len(alone))


def test_rows_with_noise_of_their_own_give_the_same_elbo(pair):
    (first, _), _ = pair
    alone = rows_of_their_own("eager", 300).losses
    assert off(first["rows"], alone) < 4  # by chance in 1 of 16,000
    assert off(first["rows, even weights"], alone) > 8
    assert apart(first["rows"], alone) > 1e3 * CLOSE  # they are other numbers


def test_errors_are_the_same_at_all(pair):
    found, _ = pair
    assert (found[0]["errors"] == found[1]["errors"]).all()
    plate, subsample, different, rows, kept, bad = found[0]["errors"]
    assert "a fit by several processes needs a pyro.plate of 21 rows, found plates none" in plate
    assert "does not run on a part of them (Shape mismatch inside plate('data') at site y dim -1" in subsample
    assert "pyro.subsample(x, event_dim=1)" in subsample
    assert "seed is 0 there and 1 here" in different
    assert "2 processes share 1 rows a step" in rows
    assert "has a checkpoint of a fit: pass resume=True" in kept
    assert bad.startswith("site 'y' in the model has a log density of nan at step 1")
    assert "seen by process 1 of 2" in bad


def test_a_signal_to_one_ends_all_after_the_same_step(pair):
    found, _ = pair
    assert len(found[0]["told"]) == len(found[1]["told"]) < 10_000
    assert all("SIGTERM" in str(one["told why"]) for one in found)


def test_one_that_raises_ends_the_other_at_once(pair):
    (first, second), _ = pair
    assert str(second["stumbled"]).startswith("no more of this")
    assert "process 1 of 2 is gone or does not answer" in str(first["stumbled"])
    assert first["seconds"] < 30


def test_streamed_rows_are_cut_as_those_of_a_step():
    share = DataParallel(mock.Mock(rank=1, count=2), ROWS)
    cut = share.cut((X, Y, "a word", X[:3]))
    assert (cut[0] == X[10:]).all()
    assert (len(cut[1]), cut[2], len(cut[3]), share.weight) == (11, "a word", 3, 11 / 21)


@pytest.mark.parametrize(("rows", "count"), [(4, 4), (10, 4), (21, 2), (1000, 7)])
def test_parts_are_all_rows_in_order_and_even(rows, count):
    parts = [shard_of(rows, rank, count) for rank in range(count)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_more_processes_and_ways(count, tmp_path, capsys):
    """All ways, with the figures."""
    work = lambda: {way: losses(way) for way in WAYS} | {"compiled, batches that are read": streamed("compiled")}  # noqa: E731
    found, alone = together(count, tmp_path, lambda rank: work(), seconds=900), work()
    differences = {way: apart(found[0][way], alone[way]) for way in alone}
    with capsys.disabled():
        print(f"\n{count} processes, largest difference of losses in nats: {differences}")
    assert max(differences.values()) < CLOSE
    assert all((one[way] == found[0][way]).all() for one in found for way in alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_rows_with_noise_of_their_own_on_both_engines(count, tmp_path, capsys):
    work = lambda rank: {engine: rows_of_their_own(engine, 4_000).losses for engine in ("eager", "compiled")}  # noqa: E731
    found, alone = together(count, tmp_path, work, seconds=600)[0], rows_of_their_own("compiled", 4_000).losses
    errors = {engine: off(values, alone) for engine, values in found.items()}
    with capsys.disabled():
        print(f"\n{count} processes: −ELBO {alone.mean():.3f} alone; standard errors apart: {errors}")
    assert max(errors.values()) < 4
    spreads = [values.std() / alone.std() for values in found.values()]
    assert max(abs(np.array(spreads) - 1)) < 5 / np.sqrt(2 * 4_000)  # as many rows have as much noise


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_noise_of_their_own_goes_on_in_the_middle_of_a_block(engine, tmp_path):
    def work(rank):
        kept = tmp_path / "kept"
        rows_of_their_own(engine, 130, checkpoint=kept)
        whole, again = rows_of_their_own(engine, 200), rows_of_their_own(engine, 200, checkpoint=kept, resume=True)
        return {"whole": whole.losses, "again": again.losses}

    for found in together(2, tmp_path, work, seconds=300):
        assert (found["whole"] == found["again"]).all()
