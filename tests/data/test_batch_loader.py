"""Batches of rows from disk: their order, from wherever reading begins, and errors by row."""

import os
import subprocess
import sys
from itertools import pairwise

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr

import inference.data.iterable_dataset
from guides import mean_field_normal
from inference import batches, fit
from tests.helpers.row_sources import ROWS, loader, model, npy, stream, taken


def mapped(folder, x, y):
    np.save(folder / "more.npy", np.concatenate([x[:3], x]))
    np.save(folder / "y.npy", y)
    return batches(np.load(folder / "more.npy", mmap_mode="r")[3:], np.load(folder / "y.npy", mmap_mode="r"))


def in_zarr(folder, x, y):
    for name, values, chunk in (("x", x, (64, 2)), ("y", y, (64,))):
        zarr.create_array(folder / f"{name}.zarr", data=values, chunks=chunk)
    return batches(folder / "x.zarr", zarr.open_array(folder / "y.zarr", mode="r"))


def in_hdf5(folder, x, y):
    file = h5py.File(folder / "xy.h5", "w")
    return batches(file.create_dataset("x", data=x, chunks=(50, 2)), file.create_dataset("y", data=y))


def parquet(folder, x, y):
    frame = pd.DataFrame({"a": x[:, 0], "y": y, "b": x[:, 1]})
    for part in range(2):
        frame[part * 500 : part * 500 + 500].to_parquet(folder / f"{part}.parquet", row_group_size=70)
    return batches(folder, target="y")


def by_columns(folder, x, y):
    np.save(folder / "f.npy", np.asfortranarray(x))
    return batches(folder / "f.npy", torch.from_numpy(y))


SOURCES = [npy, mapped, in_zarr, in_hdf5, parquet, by_columns, loader]


@pytest.mark.parametrize("source", SOURCES)
def test_each_row_comes_once_an_epoch_in_an_order_of_the_seed(source, data, tmp_path):
    x, y = data
    made = source(tmp_path, x, y)
    xs, ys = (part.flatten(0, 1) for part in taken(stream(made, size=50), 40))  # two epochs
    for epoch in (slice(0, ROWS), slice(ROWS, 2 * ROWS)):
        seen = ys[epoch].numpy()
        assert np.array_equal(np.sort(seen), np.sort(y))
        assert not np.array_equal(seen, y)
    assert not torch.equal(ys[:ROWS], ys[ROWS:])
    assert np.array_equal(xs.numpy(), x[[np.flatnonzero(y == value)[0] for value in ys.numpy()]])
    again = taken(stream(made, size=50), 40)
    assert torch.equal(again[1].flatten(), ys)
    assert not torch.equal(taken(stream(made, size=50, seed=1), 40)[1].flatten(), ys)


@pytest.mark.parametrize("source", SOURCES)
def test_the_batch_of_a_step_is_the_same_from_wherever_reading_begins(source, data, tmp_path):
    made = source(tmp_path, *data)
    whole = taken(stream(made, size=48), 50)
    part = taken(stream(made, size=48), 7, first=31)
    assert all(torch.equal(a[31:38], b) for a, b in zip(whole, part, strict=True))


def test_rows_in_their_own_order(data, tmp_path):
    x, y = data
    npy(tmp_path, x, y)
    ordered = batches(tmp_path / "x.npy", tmp_path / "y.npy", shuffle=False)
    assert np.array_equal(taken(stream(ordered, size=100), 10)[1].flatten().numpy(), y)


def test_rows_from_all_over_are_in_one_batch(tmp_path):
    rows = np.arange(10**6, dtype=np.float32)[:, None]  # in the order of what a model would learn
    np.save(tmp_path / "x.npy", rows)
    (first,) = taken(stream(batches(tmp_path / "x.npy"), size=1000), 5)
    error = rows.std() / np.sqrt(1000)
    assert ((first.mean((1, 2)) - rows.mean()).abs() < 5 * error).all()


def test_batches_are_handed_on_together_where_they_are_alike(data, monkeypatch):
    """All rows come in order, whatever their batches are, and the first batch at once."""
    monkeypatch.setattr(inference.data.iterable_dataset, "_GROUP_SECONDS", torch.inf)
    x, y = data
    cuts = [0, 50, 100, 101, 160, 400, 460, 600, 700, ROWS]
    pieces = [(x[a:b], y[a:b]) for a, b in pairwise(cuts)]
    pieces[1] = tuple(part.astype(np.float32) for part in pieces[1])
    pieces[3] = tuple(map(torch.from_numpy, pieces[3]))
    pieces[5] = pd.DataFrame(pieces[5][0]), pieces[5][1]
    opened = batches(lambda: iter(pieces), num_data=ROWS).opened(["x", "y"], torch.float64, 0)
    for start in (0, 70, ROWS + 3):
        rows, found = opened.rows(start), []
        while sum(len(piece[0]) for piece in found) < 2 * ROWS:
            found.append(next(rows))
        for part, whole in zip(zip(*found, strict=True), data, strict=True):
            expected = np.concatenate([whole] * 4)[start:][: sum(map(len, part))]
            np.testing.assert_allclose(torch.cat(part).numpy(), expected, rtol=1e-6)
        if start == 0:
            assert [len(piece[0]) for piece in found] == 2 * [50, 50, 1, 59, 240, 60, 540]


@pytest.mark.parametrize("row", [0, 130, 260])
def test_a_bad_number_of_a_later_batch_is_named_by_its_row(data, row):
    x, y = (part.copy() for part in data)
    x[row, 1] = np.inf
    pieces = [(x[begin : begin + 20], y[begin : begin + 20]) for begin in range(0, ROWS, 20)]
    source = batches(lambda: iter(pieces), num_data=ROWS)
    with pytest.raises(ValueError, match=rf"x .*{row}"):
        fit(model, mean_field_normal(model), source, steps=60, lr=0.01, progress=False)


def test_a_file_that_is_not_whole(data, tmp_path):
    npy(tmp_path, *data)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="ends before its 1,000 rows"):
        stream(batches(tmp_path / "x.npy"))
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        stream(batches(tmp_path / "x.npy"))


MEMORY = """
import resource, sys, numpy as np, torch
from tests.helpers.row_sources import model
from guides import mean_field_normal
from inference import batches, fit
def run(steps):
    source = batches(f"{sys.argv[1]}/x.npy", f"{sys.argv[1]}/y.npy")
    fit(model, mean_field_normal(model), source, batch_size=1000, steps=steps, lr=0.01, engine="eager", progress=False)
run(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(150)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    rows = 12_000_000  # 288 MB
    for name, shape in (("x", (rows, 2)), ("y", (rows,))):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float64, shape).flush()
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert float(found.stdout) < 100
