"""Predictions that are written as they are made: the same functions, in bounded memory, and after any break."""

import errno
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
import zarr
from filelock import FileLock
from pyro.infer.autoguide import AutoNormal

from guides import bernoulli_dropout
from inference import StoredClassPrediction, StoredPrediction, fit, load, open_prediction
from inference.model.vectorization import BlockSize, MemoryProbe
from inference.predictive import streaming
from inference.predictive.zarr_store import PredictionStore
from ppl_models import DropoutRegression, bnn_regression, linear_regression
from tests.helpers.torchrun import forked

ROWS = 50
X = torch.linspace(-3, 3, ROWS).reshape(-1, 1)
QUIET = {"progress": False}
NETWORK = partial(bnn_regression, hidden=(5,))


def classes(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 3.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("label", dist.Categorical(logits=x @ w), obs=y)


def fitted(model, x, y, guide=None, **options):
    return fit(model, guide or AutoNormal(model), x, y, **{"steps": 200, "lr": 0.03, **QUIET, **options})


@pytest.fixture(scope="module")
def network(line):
    return fitted(NETWORK, line.x, line.y)


@pytest.fixture(scope="module")
def labels(line):
    return fitted(classes, line.x, (line.x[:, 0] > 0).long() * 2)


def in_batches(posterior, out, **options):
    return posterior.predict(X, **{"draws": 20, "batch_size": 7, "out": out, **QUIET, **options})


def content(out):
    """Every file of a store, by name."""
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [None, 7])
def test_functions_are_those_of_all_rows_together(line, tmp_path, dtype, size):
    posterior = fitted(NETWORK, line.x, line.y, dtype=dtype, steps=20)
    whole = posterior.predict(X, draws=20, seed=4)
    found = in_batches(posterior, tmp_path / "p.zarr", batch_size=size, seed=4)
    exact = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-12}
    assert isinstance(found, StoredPrediction)
    assert found.draws.dtype == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(torch.from_numpy(found.draws.values), whole.draws, **exact)
    for name in ("mean", "epistemic", "noise", "variance", "std"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), **exact)


def test_classes_are_those_of_all_rows_together(labels, tmp_path):
    whole, found = labels.predict(X, draws=20), in_batches(labels, tmp_path / "p.zarr")
    assert isinstance(found, StoredClassPrediction)
    torch.testing.assert_close(torch.from_numpy(found.draws.values), whole.draws)
    for name in ("probs", "entropy", "mutual_information"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), atol=1e-6, rtol=1e-5)
    assert torch.equal(found.labels, whole.labels)
    assert found.samples.shape == (20, ROWS)
    assert found.at(slice(3, 5)).draws.shape == (20, 2, 3)
    short = in_batches(labels, tmp_path / "s.zarr", keep="summary")
    for name in ("probs", "entropy", "mutual_information", "variation_ratio"):
        assert torch.equal(getattr(short, name), getattr(found, name))


def test_the_noise_is_that_of_the_model(line, tmp_path):
    posterior = fitted(partial(linear_regression, noise=0.5), line.x, line.y)
    found = in_batches(posterior, tmp_path / "p.zarr", draws=2000)
    noise = found.samples.values - found.draws.values
    # 100,000 numbers: their sd has a relative standard error of 1/√(2·10⁵) = 0.22 %; a correlation of two rows 2.2 %.
    assert noise.std() == pytest.approx(0.5, rel=0.01)
    between = np.corrcoef(noise.T)[np.triu_indices(ROWS, 1)]
    assert np.abs(between).max() < 5 / 2000**0.5  # batches do not repeat each other's random numbers
    assert between.std() == pytest.approx(2000**-0.5, rel=0.1)


def test_intervals_and_quantiles_are_those_of_the_same_samples(network, tmp_path):
    found = in_batches(network, tmp_path / "p.zarr", draws=60)
    whole = found.at(slice(0, ROWS))
    short = in_batches(network, tmp_path / "s.zarr", draws=60, keep="summary", quantiles=(0.05, 0.1, 0.9, 0.95))
    for of in ("observations", "functions"):
        for prob in (0.8, 0.9):
            for end, other, wanted in zip(
                short.interval(prob, of), found.interval(prob, of), whole.interval(prob, of), strict=True
            ):
                torch.testing.assert_close(other, wanted)
                torch.testing.assert_close(end, wanted)
    assert torch.equal(short.mean, found.mean)
    with pytest.raises(ValueError, match=r"has the quantiles \[0.05, 0.1, 0.9, 0.95\].* from 0.25 to 0.75.*quantiles="):
        short.interval(0.5)
    for ask in (lambda: short.draws, lambda: short.samples, short.to_arviz, lambda: short.at(slice(0, 2))):
        with pytest.raises(ValueError, match=r"has no draws, only epistemic, .*keep='draws'"):
            ask()
    with pytest.raises(ValueError, match="'observations' or 'functions'"):
        short.interval(0.9, "noise")


def test_rows_are_read_from_wherever_they_lie(network, tmp_path):
    array = X.numpy()
    np.save(tmp_path / "x.npy", array)
    stored = zarr.create_array(tmp_path / "x.zarr", data=array, chunks=(9, 1))
    places = [array, array.tolist(), np.load(tmp_path / "x.npy", mmap_mode="r"), stored, tmp_path / "x.npy"]
    first, *others = [
        content(network.predict(x, draws=20, batch_size=7, out=tmp_path / f"{number}.zarr", **QUIET).path)
        for number, x in enumerate([X, *places])
    ]
    for other in others:
        assert other == first


def test_it_is_opened_again(network, tmp_path):
    found = in_batches(network, tmp_path / "p.zarr")
    again = open_prediction(str(tmp_path / "p.zarr"))
    assert repr(again) == repr(found)
    assert "20 draws, keep='draws'" in repr(found)
    assert len(again) == ROWS
    assert torch.equal(again.std, found.std)
    plain = xr.open_zarr(tmp_path / "p.zarr", group="predictions", chunks=None, consolidated=False)
    assert plain["y"].dims == ("chain", "draw", "data")


class Broken(Exception):
    pass


def broken(monkeypatch, number):
    """Writing ends at that array: six belong to a batch, the last of which says that it is whole."""
    write = zarr.Array.__setitem__
    writes = []

    def fail(array, index, value):
        writes.append(array.path)
        if len(writes) > number:
            raise Broken
        write(array, index, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", fail)


@pytest.mark.parametrize(("keep", "done"), [("draws", 0), ("draws", 4), ("draws", 5), ("summary", 5)])
def test_a_break_changes_nothing(network, tmp_path, monkeypatch, keep, done):
    whole = content(in_batches(network, tmp_path / "whole.zarr", keep=keep).path)
    out = tmp_path / "p.zarr"
    with monkeypatch.context() as patch:
        broken(patch, 12 + done)
        with pytest.raises(Broken):
            in_batches(network, out, keep=keep)
    with pytest.raises(ValueError, match=r"unfinished, 14 of 50 rows .*resume=True"):
        open_prediction(out)
    with pytest.raises(ValueError, match=r"a prediction of which 14 of 50 rows are there: pass resume=True"):
        in_batches(network, out, keep=keep)
    found = in_batches(network, out, keep=keep, resume=True)
    assert content(out) == whole
    assert repr(in_batches(network, out, keep=keep, resume=True)) == repr(found)  # nothing is left to do
    monkeypatch.setattr(streaming, "versions", lambda: {"torch": "0.1"})
    with pytest.warns(UserWarning, match="of other versions: .*torch is .* there and 0.1 here"):
        in_batches(network, out, keep=keep, resume=True)


def test_it_goes_on_from_a_saved_posterior(network, tmp_path, monkeypatch):
    whole = content(in_batches(network, tmp_path / "whole.zarr").path)
    with monkeypatch.context() as patch:
        broken(patch, 27)
        with pytest.raises(Broken):
            in_batches(network, tmp_path / "p.zarr")
    again = load(network.save(tmp_path / "run"), NETWORK, AutoNormal(NETWORK))
    in_batches(again, tmp_path / "p.zarr", resume=True)
    assert content(tmp_path / "p.zarr") == whole


def test_killed_processes_go_on(network, tmp_path):
    options = {"batch_size": 2}
    whole = content(in_batches(network, tmp_path / "whole.zarr", **options).path)
    out, moments, found = tmp_path / "p.zarr", random.Random(0), []
    for rows in (1, 15, 30):
        child = forked(lambda: in_batches(network, out, resume=True, **options))
        while not out.exists() or PredictionStore.open(out).whole < rows:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append(PredictionStore.open(out).whole)
    assert 0 < found[0] < ROWS
    in_batches(network, out, resume=True, **options)
    assert content(out) == whole


def test_another_prediction_is_not_gone_on_with(network, labels, line, tmp_path):
    out = tmp_path / "p.zarr"
    before = content(in_batches(network, out).path)
    others = {
        "draws is 20 there and 21 here": {"draws": 21},
        "seed is 0 there and 1 here": {"seed": 1},
        "batch_size is 7 there and 8 here": {"batch_size": 8},
        "keep is draws there and summary here": {"keep": "summary"},
    }
    for words, options in others.items():
        with pytest.raises(ValueError, match=f"has another prediction: .*{words}"):
            in_batches(network, out, resume=True, **options)
    moved = X.clone()
    moved[33] += 1e-6
    with pytest.raises(ValueError, match="x has changed"):
        network.predict(moved, draws=20, batch_size=7, out=out, resume=True, **QUIET)
    with pytest.raises(ValueError, match="the fitted parameters has changed"):
        in_batches(fitted(NETWORK, line.x, line.y, steps=20), out, resume=True)
    with pytest.raises(ValueError, match=r"model is|model.source"):
        in_batches(labels, out, resume=True)
    with pytest.raises(ValueError, match=r"p.zarr has a prediction of 50 rows already: pass resume=True"):
        in_batches(network, out)
    assert content(out) == before


@pytest.mark.parametrize(
    ("options", "words"),
    {
        "keep": ({"keep": "mean"}, "keep is 'mean': pass 'draws' or 'summary'"),
        "quantiles of draws": ({"quantiles": (0.1,)}, "quantiles= goes with keep='summary'"),
        "no quantiles": ({"keep": "summary", "quantiles": ()}, r"quantiles is \(\)"),
        "no share": ({"keep": "summary", "quantiles": (0.1, 2)}, "each of quantiles is 2"),
        "batch": ({"batch_size": 0}, "batch_size is 0"),
        "resume": ({"resume": "yes"}, "resume is 'yes'"),
        "seed": ({"seed": -1}, "seed is -1"),
        "draws": ({"draws": 0}, "draws is 0"),
        "without out": ({"out": None, "keep": "summary"}, "pass out= too"),
    }.values(),
)
def test_what_cannot_be_is_refused_and_leaves_nothing(network, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        in_batches(network, **{"out": tmp_path / "p.zarr", **options})
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_is_named_by_its_row_and_leaves_nothing(network, tmp_path, monkeypatch):
    monkeypatch.setattr("inference.predictive.streaming._READ", 10)
    bad = X.numpy().copy()
    bad[33] = np.nan
    for x, words in (
        (bad, r"x\[30:40\] has 1 values that are NaN or infinite, the first is nan at row 33, column 0"),
        (X.repeat(1, 2), r"x has shape \(10, 2\) but the fit saw \(40, 1\)"),
        (X[:0], "x has no rows"),
        (X.to_sparse(), "x is sparse"),
    ):
        with pytest.raises(ValueError, match=words):
            network.predict(x, draws=5, out=tmp_path / "p.zarr", **QUIET)
    with pytest.raises(ValueError, match="x has 50 rows but y has 49"):
        network.predict(X, X[:49, 0], draws=5, out=tmp_path / "p.zarr", **QUIET)
    with pytest.raises(ValueError, match="there are none"):
        network.predict(draws=5, out=tmp_path / "p.zarr", **QUIET)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_there(network, tmp_path):
    for name, make in {
        "file": lambda p: p.write_text("mine"),
        "folder": Path.mkdir,
        "other": zarr.create_group,
    }.items():
        out = tmp_path / name
        make(out)
        with pytest.raises(ValueError, match="give"):
            in_batches(network, out, resume=True)
        with pytest.raises((ValueError, FileNotFoundError), match="give the out= of"):
            open_prediction(out)
    with pytest.raises(FileNotFoundError, match="is no prediction"):
        open_prediction(tmp_path / "nothing")
    with pytest.raises(OSError, match="file cannot be written"):
        in_batches(network, tmp_path / "file" / "p.zarr")
    assert (tmp_path / "file").read_text() == "mine"


def test_one_process_writes_at_a_time(network, tmp_path, monkeypatch):
    write = zarr.Array.__setitem__
    said = []

    def twice(array, index, value):
        if not said:
            said.append("asked")
            with pytest.raises(ValueError, match="written to by another process"):
                in_batches(network, tmp_path / "p.zarr", resume=True)
        write(array, index, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", twice)
    in_batches(network, tmp_path / "p.zarr")
    assert said


def test_a_disk_that_is_full_is_named(network, tmp_path, monkeypatch):
    whole = content(in_batches(network, tmp_path / "whole.zarr").path)
    out, limits, write = tmp_path / "p.zarr", resource.getrlimit(resource.RLIMIT_FSIZE), PredictionStore.write

    def full(store, number, fields):
        if number == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        write(store, number, fields)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(PredictionStore, "write", full)
            with pytest.raises(OSError, match=r"p.zarr cannot be written .*make room there; resume=True .* at row 21"):
                in_batches(network, out)
        with pytest.raises(OSError, match=f"{tmp_path} cannot be written"):
            in_batches(network, tmp_path / "new.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "new.zarr").exists()
    in_batches(network, out, resume=True)
    assert content(out) == whole


def test_a_folder_that_cannot_be_written_is_named(network, tmp_path, monkeypatch):
    def denied(lock):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", denied)
        with pytest.raises(OSError, match=r"p.zarr cannot be written \(Permission denied\): see to its permissions"):
            in_batches(network, tmp_path / "p.zarr")
    user = os.geteuid()
    try:
        tmp_path.chmod(0o555)
        if user == 0:  # who may write anywhere
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"cannot be written \(Permission denied\): give a folder that can"):
            in_batches(network, tmp_path / "new.zarr")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)


def test_damage_is_seen(network, tmp_path):
    out = in_batches(network, tmp_path / "p.zarr").path
    chunk = out / "predictions" / "y" / "c" / "0" / "0" / "2"
    raw = bytearray(chunk.read_bytes())
    raw[40] ^= 1
    chunk.write_bytes(raw)
    found = open_prediction(out)
    assert found.mean.shape == (ROWS,)
    with pytest.raises(ValueError, match=r"'predictions/y' is damaged .*checksum"):
        found.interval(0.9)
    chunk.unlink()
    with pytest.raises(ValueError, match=r"array predictions/y has 7 of 8 batches of rows"):
        open_prediction(out)
    shutil.copy(chunk.with_name("1"), chunk)
    (out / "summary" / "mean" / "zarr.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'summary' is damaged"):
        open_prediction(out)
    manifest = out / "zarr.json"
    manifest.write_text(manifest.read_text().replace('"draws": 20', '"draws": 21'))
    with pytest.raises(ValueError, match="is damaged"):
        open_prediction(out)


def test_arviz_reads_what_it_is_asked_for(network, labels, tmp_path):
    for posterior, site in ((network, "y"), (labels, "label")):
        found = in_batches(posterior, tmp_path / f"{site}.zarr")
        exported = found.to_arviz()
        group = exported["predictions"]
        assert group[site].dims == ("chain", "draw", "data")
        assert group[site].sizes == {"chain": 1, "draw": 20, "data": ROWS}
        assert group[f"{site}_functions"].dims == ("chain", "draw", "data", "label_class")[: 3 + (site == "label")]
        np.testing.assert_array_equal(group[site].values[0], found.samples.values)
        np.testing.assert_array_equal(group["data"].values, np.arange(ROWS))
        both = posterior.to_arviz(draws=5, prediction=found)
        assert both["predictions"].sizes["draw"] == 20
        assert both["posterior"].sizes["draw"] == 5


def test_arviz_leaves_the_draws_where_they_are(network, tmp_path, monkeypatch):
    found = in_batches(network, tmp_path / "p.zarr")
    read = []
    get = zarr.storage.LocalStore.get

    async def seen(store, key, *args, **kwargs):
        read.append(key)
        return await get(store, key, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", seen)
    exported = found.to_arviz()
    assert not [key for key in read if "/c/" in key]
    exported["predictions"]["y"].isel(draw=3, data=slice(0, 7)).values  # noqa: B018 - reads
    assert {key for key in read if "/c/" in key} == {"predictions/y/c/0/0/0"}


def local(x, y=None):
    """A latent of its own for every row."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.1))
        pyro.sample("y", dist.Normal(z, 0.1), obs=y)


def test_latents_of_rows_are_those_of_the_fit_or_of_the_model(tmp_path):
    x, y = torch.arange(30.0), torch.linspace(2, 4, 30)
    posterior = fitted(local, x, y, steps=80, lr=0.2)
    options = {"draws": 200, "batch_size": 7, **QUIET}
    seen = posterior.predict(x.numpy(), out=tmp_path / "seen.zarr", **options)
    torch.testing.assert_close(torch.from_numpy(seen.draws.values), posterior.predict(x, **options).draws)
    assert seen.mean[-1] - seen.mean[0] > 0.7
    fresh = posterior.predict(x + 1, out=tmp_path / "fresh.zarr", **options)
    assert (fresh.mean - 3).abs().max() < 0.1


def test_draws_that_are_given_and_draws_of_each_row(network, line, tmp_path):
    given = network.sample(20, seed=3)
    found = in_batches(network, tmp_path / "given.zarr", draws=given)
    torch.testing.assert_close(torch.from_numpy(found.draws.values), network.predict(X, draws=given).draws)
    with pytest.raises(ValueError, match="draws of w0 has changed"):
        in_batches(network, tmp_path / "given.zarr", draws=network.sample(20, seed=4), resume=True)
    model = DropoutRegression(1, hidden=8)
    dropped = fitted(model, line.x, line.y, bernoulli_dropout(model), steps=20)
    rows = in_batches(dropped, tmp_path / "rows.zarr", per_row=True).draws.values
    assert np.corrcoef(rows[:, 0], rows[:, 1])[0, 1] < 0.9


@pytest.mark.parametrize("rows", [1, 100, 10**9])
@pytest.mark.parametrize("most", [None, 30])
def test_a_block_is_bounded(rows, most):
    sizes = (
        (1, 1, 1, 1),
        (10, 100, 1, 1000),
        (784, 1, 784, 1000),
        (1e9, 1, 1e9, 10),
        (50, 1, 1, 10**7),
        (9, 1e6, 1, 9),
    )
    for of_row, of_draw, kept, draws in sizes:
        seen = SimpleNamespace(of_row=of_row, of_draw=int(of_draw))
        block = BlockSize.bounded(seen, kept, draws, rows, most)
        assert min(block) >= 1
        assert block.rows <= min(rows, most or rows)
        assert block.rows == 1 or max(block.rows * draws * kept, block.rows * of_row) <= 2**21
        assert block.draws == 1 or block.draws * max(of_draw, block.rows * of_row) <= 2**21


def test_the_largest_tensors_are_seen():
    weights, x = torch.ones(30, 50), torch.ones(7, 30)
    with MemoryProbe(7) as seen:
        (x @ (weights * 2)).tanh().sum(1)
    assert (seen.of_row, seen.of_draw) == (50, 1500)


def peak():
    """The most memory that this process has taken, in MiB."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(found.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_rows(line, tmp_path):
    """The functions of 200,000 rows at 200 draws take 160 MB, and so do their samples."""
    posterior = fitted(linear_regression, line.x, line.y, steps=5)
    x = np.zeros((200_000, 1), dtype=np.float32)
    grown = {}

    def measured(rows):
        before = peak()
        posterior.predict(x[:rows], draws=200, out=tmp_path / str(rows), **QUIET)
        (tmp_path / "grown").write_text(str(peak() - before))

    for rows in (20_000, 200_000):
        assert os.waitpid(forked(partial(measured, rows)), 0)[1] == 0
        grown[rows] = float((tmp_path / "grown").read_text())
    assert max(grown.values()) < 250
    assert grown[200_000] < grown[20_000] + 100  # the rows between have 288 MB of both
