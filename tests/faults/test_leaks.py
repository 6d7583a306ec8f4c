"""Fits one after the other leave nothing behind: no memory, tensors, threads, open files, figures or folders."""

import ctypes
import gc
import os
import tempfile
import threading
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from guides import mean_field_normal
from inference import JsonLines, Snapshots, fit, load
from ppl_models import linear_regression

ROWS = 2**19
MODEL = partial(linear_regression, noise=1.0)
GUIDE = mean_field_normal(MODEL)
LIBC = ctypes.CDLL(None)
PAGE = os.sysconf("SC_PAGE_SIZE")
KEPT = 2**22  # bytes that the allocator may keep for later, over all fits
MOST = 0.01  # of the data of a fit, that a fit may leave


def data(rows=ROWS, columns=7):
    x = torch.linspace(-1, 1, rows * columns).reshape(rows, columns)
    return x, x.sum(1)


def fitted(x, y, **options):
    return fit(MODEL, GUIDE, x, y, **{"steps": 3, "engine": "eager", "progress": False, **options})


def held():
    """What the process holds now, once nothing waits to be collected, nor to be given back to the system."""
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
    alive = [weakref.ref(one) for one in gc.get_objects() if issubclass(type(one), torch.Tensor | Figure)]
    return SimpleNamespace(
        memory=int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
        objects=len(alive),
        threads=len(os.listdir("/proc/self/task")),
        files=len(os.listdir("/proc/self/fd")),
        figures=len(pyplot.get_fignums()),
        folders=sorted(os.listdir(tempfile.gettempdir())),
    )


def leaves_nothing(work, count, unit):
    """Does ``work`` that many times and compares what is held then with before; ``unit`` is bytes of a fit's data."""
    for number in range(3):  # what is made once and kept for good
        work(number)
    before = [held(), held()][1]
    for number in range(count):
        work(number)
    after = held()
    grown = (after.memory - before.memory - KEPT) / count
    assert grown < MOST * unit, f"{grown:,.0f} bytes a fit, of {unit:,} bytes of data"
    for name in ("objects", "threads", "files", "figures", "folders"):
        assert getattr(after, name) == getattr(before, name), name


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def plain(x, y, place, number):
    fitted(x, y)


def watched(x, y, place, number):
    callbacks = [Snapshots(place / "kept", keep=2, overwrite=True), JsonLines(place / "lines.jsonl", overwrite=True)]
    fitted(x, y, callbacks=callbacks)


def asked(x, y, place, number):
    posterior = fitted(x, y)
    posterior.predict(x[:1000], draws=20)
    posterior.diagnose(draws=100, repeats=1)
    loaded = load(posterior.save(place / "run"), MODEL, GUIDE)
    loaded.evaluate(x[:100], y[:100], draws=20)


def failing(x, y, place, number):
    with pytest.raises(ValueError, match="at step"):
        fitted(x, y, lr=lambda step: 1e30 if step else 0.01, steps=20)


def compiled(x, y, place, number):
    fitted(x, y, engine="compiled")


KINDS = {"plain": plain, "watched": watched, "asked": asked, "failing": failing}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_fits_leave_nothing_behind(kind, tmp_path):
    x, y = data()
    leaves_nothing(partial(KINDS[kind], x, y, tmp_path), 50, x.nbytes)


@pytest.mark.parametrize("kind", ["watched", "failing"])
def test_fits_leave_nothing_behind(kind, tmp_path):
    x, y = data(2**10)
    leaves_nothing(partial(KINDS[kind], x, y, tmp_path), 5, 2**24)


@pytest.mark.slow
def test_compiled_fits_of_one_program_leave_nothing_behind(tmp_path):
    x, y = data()
    leaves_nothing(partial(compiled, x, y, tmp_path), 50, x.nbytes)


@pytest.mark.slow
def test_compiled_fits_of_other_shapes_leave_nothing_behind(tmp_path):
    def work(number):
        x, y = data(ROWS + number % 10)
        fitted(x, y, engine="compiled")

    for number in range(10):
        work(number)
    leaves_nothing(work, 50, 4 * 7 * ROWS)


@pytest.mark.slow
def test_reports_leave_nothing_behind(tmp_path):
    x, y = data(2**12)

    def work(number):
        fitted(x, y).report(tmp_path / "report.html", test=(x[:100], y[:100]), progress=False)

    leaves_nothing(work, 10, 2**25)


@pytest.mark.parametrize("options", [{}, {"particles": 2}, {"batch_size": 100}, {"restarts": 2}])
def test_the_data_of_a_fit_go_with_it_without_waiting_to_be_collected(options):
    x, y = data(1000)
    gc.collect()
    gc.disable()
    try:
        posterior = fitted(x, y, **options)
        posterior.predict(x[:10], draws=10)
        kept = weakref.ref(posterior.data[0])
        del posterior
        assert kept() is None
    finally:
        gc.enable()


LEAKS = {
    "memory": lambda kept: kept.append(bytearray(os.urandom(2**20))),
    "objects": lambda kept: kept.append(torch.zeros(1)),
    "threads": lambda kept: kept.append(threading.Thread(target=kept[0].wait, daemon=True)) or kept[-1].start(),
    "files": lambda kept: kept.append(open(os.devnull)),  # noqa: SIM115 - the leak that is to be seen
    "figures": lambda kept: pyplot.figure(),
    "folders": lambda kept: tempfile.mkdtemp(),
}


@pytest.mark.parametrize(
    "leak", ["objects", *(pytest.param(n, marks=pytest.mark.slow) for n in LEAKS if n != "objects")]
)
def test_a_leak_on_purpose_is_seen(leak):
    kept = [threading.Event()]
    try:
        with pytest.raises(AssertionError, match="bytes a fit" if leak == "memory" else "objects|" + leak):
            leaves_nothing(lambda number: LEAKS[leak](kept), 10, 2**24)
    finally:
        kept[0].set()
        pyplot.close("all")
        for one in kept:
            if hasattr(one, "close"):
                one.close()
