"""A fit that was cut off goes on to the numbers of one that never was; nothing else is gone on with."""

import os
import re
import shutil
import signal
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam

from guides import full_rank_normal, mean_field_normal
from inference import Checkpoint, JsonLines, NonFinite, Snapshots, cosine_decay, every, fit, fresh, load
from inference.storage.fit_fingerprint import describe_differences, fingerprint_of
from inference.storage.tensor_archive import flatten, unflatten
from inference.utils.processes import interruptible
from ppl_models import linear_regression

STEPS = 150
SIMPLE = partial(linear_regression, noise=0.3, intercept=False)


class Cut(Exception):
    """The end of a process, as a callback sees it."""


def cut(now):
    raise Cut


def run(line, folder=None, guide=mean_field_normal, model=linear_regression, data=None, **options):
    built = guide(model) if isinstance(guide, type(run)) else guide
    data = (line.x, line.y) if data is None else data
    given = {"steps": STEPS, "lr": 0.01, "engine": "eager", "progress": False, **options}
    return fit(model, built, *data, checkpoint=folder, **given)


def same(one, other):
    draws, others = one.sample(3), other.sample(3)
    return (
        np.array_equal(one.losses, other.losses)
        and np.array_equal(one.kl, other.kl, equal_nan=True)
        and all(torch.equal(draws[name], others[name]) for name in draws)
        and one.record.starts == other.record.starts
        and one.record.stop == other.record.stop
        and one.record.evaluations == other.record.evaluations
    )


def points():
    x = torch.rand(20, 1)
    return x, x[:, 0].exp()


WAYS = {
    "adam": {},
    "clipped, cosine": {"optimizer": ClippedAdam, "lr": cosine_decay(0.02, STEPS)},
    "momentum": {"optimizer": partial(torch.optim.SGD, momentum=0.9), "lr": 1e-5},
    "an optimiser of torch": {"optimizer": torch.optim.RAdam},
    "mini-batches": {"batch_size": 7},
    "annealed": {"anneal": 100, "particles": 2},
    "restarts": {"restarts": 3, "steps": 60},
}


@pytest.fixture(scope="module")
def ended(line, tmp_path_factory):
    """A fit that has ended, and its folder."""
    folder = tmp_path_factory.mktemp("ended")
    return SimpleNamespace(posterior=run(line, folder), folder=folder)


@pytest.fixture
def folder(ended, tmp_path):
    """Of a fit that has ended, for one test."""
    return shutil.copytree(ended.folder, tmp_path / "run")


@pytest.mark.parametrize(("way", "at"), [("adam", 3), *((way, 80) for way in WAYS)])
def test_a_fit_that_goes_on_is_the_fit_that_was_never_cut(line, tmp_path, way, at):
    options = WAYS[way]
    whole = run(line, **options)
    with pytest.raises(Cut):
        run(line, Checkpoint(tmp_path, every=13), callbacks=[every(at, cut)], **options)
    assert same(whole, run(line, Checkpoint(tmp_path, every=50), resume=True, **options))
    assert same(whole, run(line, tmp_path, resume=True, **options))  # it has ended, and is there still


@pytest.mark.parametrize(
    ("engine", "at"),
    [
        ("compiled", 1250),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("compiled", 30), ("eager", 1100))),
    ],
)
def test_so_does_one_that_finds_its_own_way(line, tmp_path, engine, at):
    """Before and after the steps begin to fall, in the middle of a block of noise too."""
    options = {"model": SIMPLE, "guide": full_rank_normal, "lr": None, "steps": 2000, "engine": engine}
    whole = run(line, **options)
    with pytest.raises(Cut):
        run(line, Checkpoint(tmp_path, every=17), callbacks=[every(at, cut)], **options)
    assert same(whole, run(line, tmp_path, resume=True, **options))


def test_fresh_data_go_on_too(line, tmp_path):
    whole = run(line, data=(fresh(points),))
    with pytest.raises(Cut):
        run(line, Checkpoint(tmp_path, every=10), data=(fresh(points),), callbacks=[every(80, cut)])
    assert same(whole, run(line, tmp_path, data=(fresh(points),), resume=True))


def test_other_random_numbers_would_be_noticed(line, ended, tmp_path, monkeypatch):
    """The twin that must fail: a stream that begins anew."""
    from inference.utils.random_state import RandomStream

    with pytest.raises(Cut):
        run(line, Checkpoint(tmp_path, every=10), callbacks=[every(100, cut)])
    monkeypatch.setattr(RandomStream, "restored", classmethod(lambda cls, saved: cls.seeded(0)))
    assert not same(ended.posterior, run(line, tmp_path, resume=True))


def test_more_steps_can_be_asked_for_where_each_is_the_same(line, tmp_path):
    run(line, tmp_path, steps=100)
    assert same(run(line, steps=150), run(line, tmp_path, steps=150, resume=True))
    with pytest.raises(ValueError, match="has taken 150 steps"):
        run(line, tmp_path, steps=120, resume=True)


def test_there_may_be_nothing_yet(line, ended, tmp_path):
    assert same(ended.posterior, run(line, tmp_path / "new" / "run", resume=True))


def other_model(x, y=None):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": other_model}, "model.source has changed"),
        ({"model": partial(linear_regression, noise=0.2)}, "model.noise is learned there and 0.2 here"),
        ({"guide": full_rank_normal}, "guide"),
        ({"dtype": "float64"}, "dtype is torch.float32 there and torch.float64 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"lr": 0.02}, "lr is 0.01 there and 0.02 here"),
        ({"lr": cosine_decay(0.01, STEPS)}, "lr"),
        ({"optimizer": "adamw"}, "optimizer"),
        ({"particles": 2}, "particles is 1 there and 2 here"),
        ({"engine": "compiled"}, "eager engine"),
        ({"steps": 50}, f"has taken {STEPS} steps"),
    ],
)
def test_another_fit_is_refused_with_what_differs(line, folder, options, words):
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    with pytest.raises(ValueError, match=words):
        run(line, folder, resume=True, **options)
    assert before == sorted((path.name, path.read_bytes()) for path in folder.iterdir())


def test_steps_that_are_found_are_refused_too_and_not_begun_anew(line, tmp_path):
    options = {"lr": None, "steps": 1000}
    with pytest.raises(Cut):
        run(line, Checkpoint(tmp_path, every=10), callbacks=[every(20, cut)], **options)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="eager engine"):
        run(line, tmp_path, resume=True, **{**options, "engine": "compiled"})
    assert before == sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())


def test_other_data_are_refused(line, folder):
    with pytest.raises(ValueError, match="another fit: y has changed: ask"):
        run(line, folder, data=(line.x, line.y + 1e-6), resume=True)


def test_what_is_there_is_not_written_over_unasked(line, folder):
    with pytest.raises(ValueError, match="pass resume=True"):
        run(line, folder)
    with pytest.raises(ValueError, match="pass checkpoint="):
        run(line, resume=True)
    with pytest.raises(ValueError, match="resume is 1"):
        run(line, folder, resume=1)


def test_a_fit_that_fails_on_its_input_leaves_no_folder(line, tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        run(line, tmp_path / "a" / "b", batch_size=2, model=other_model_without_plate, guide=mean_field_normal)
    assert not list(tmp_path.iterdir())


def other_model_without_plate(x, y=None):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ weights, 1.0).to_event(1), obs=y)


def test_a_second_writer_is_told_and_touches_nothing(line, tmp_path):
    seen = []

    def second(now):
        before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
        for resume in (False, True):
            with pytest.raises(ValueError, match="being written to by another fit"):
                run(line, tmp_path, resume=resume)
        seen.append(before == sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()))

    run(line, Checkpoint(tmp_path, every=20), callbacks=[every(60, second)])
    assert seen == [True, True, True]
    run(line, tmp_path, resume=True)  # once it has ended, the folder is free


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_fit_whole(line, ended, tmp_path, number):
    def end(now):
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.warns(UserWarning, match=f"interrupted by {number.name} after 100 of 150 steps"):
        posterior = run(line, tmp_path, callbacks=[every(100, end)])
    assert signal.getsignal(number) is before
    assert len(posterior.losses) == 100
    assert posterior.stop_reason == f"was interrupted by {number.name} after 100 of 150 steps"
    posterior.save(tmp_path / "saved")
    again = load(tmp_path / "saved", linear_regression, mean_field_normal(linear_regression))
    assert again.record.stop == posterior.record.stop
    assert same(ended.posterior, run(line, tmp_path, resume=True))


def test_a_second_signal_does_what_it_does_elsewhere():
    with interruptible() as stop_signal:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_signal.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_of_the_program_and_of_other_threads_are_left_alone():
    heard = []
    outside = signal.signal(signal.SIGTERM, lambda *_: heard.append("program"))
    try:
        with interruptible() as stop_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (heard, stop_signal.signal) == (["program"], None)
    finally:
        signal.signal(signal.SIGTERM, outside)
    thread = threading.Thread(target=lambda: heard.append(interruptible().__enter__()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Poison:
    """Numbers that a model multiplies by, each 1 until a callback makes it NaN after 130 steps."""

    def __init__(self):
        self.value = {name: torch.ones(()) for name in ("likelihood", "scale", "gradient")}

    def at(self, change):
        return every(130, lambda now: change() if now.step == 130 else None)

    def model(self, x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        kink = (w - w.detach() + self.value["gradient"]).sqrt()  # the slope at 0 is infinite
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0] * self.value["likelihood"] + kink, 0.3), obs=y)

    def guide(self, x, y=None):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("spread", torch.tensor(0.1), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale * self.value["scale"]))


NAMED = {
    "likelihood": (
        "y",
        None,
        r"site 'y' in the model has a log density of nan at step 130: first at \[0\], Normal has value .*, loc nan",
    ),
    "scale": (
        "w",
        None,
        "site 'w' in the guide has a value of nan at step 130: Normal has value nan, loc .*, scale nan",
    ),
    "data": ("y", None, r"site 'y' in the model has a value of nan at step 130: in its data, first at \[3\]"),
    "gradient": ("y", "loc", "gradient of site 'y' in the model by parameter 'loc' is inf at step 130"),
}


@pytest.mark.parametrize("planted", NAMED)
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_number_that_is_not_finite_is_named_and_the_last_good_state_kept(line, tmp_path, engine, planted):
    poison, y = Poison(), line.y.clone()

    def spoil():
        if planted == "data":
            y[3] = torch.nan
        else:
            poison.value[planted].fill_(0.0 if planted == "gradient" else torch.nan)

    options = {"model": poison.model, "guide": poison.guide, "engine": engine}
    with pytest.raises(NonFinite) as caught:
        run(line, tmp_path, data=(line.x, y), callbacks=[poison.at(spoil)], **options)
    site, parameter, words = NAMED[planted]
    error = caught.value
    assert (error.step, error.site, error.parameter) == (130, site, parameter)
    assert re.search(words, str(error)), error
    healthy = run(line, steps=130, **{**options, "model": Poison().model, "guide": Poison().guide})
    assert np.array_equal(error.posterior.losses, healthy.losses)
    assert error.posterior.params["loc"] == healthy.params["loc"]


def test_logs_and_snapshots_of_a_fit_that_goes_on_are_added_to(line, tmp_path):
    def watchers():
        return [JsonLines(tmp_path / "fit.jsonl", every=20), Snapshots(tmp_path / "kept", every=50)]

    with pytest.raises(Cut):
        run(line, Checkpoint(tmp_path / "run", every=90), steps=230, callbacks=[*watchers(), every(150, cut)])
    run(line, tmp_path / "run", steps=230, callbacks=watchers(), resume=True)
    steps = [int(text.split('"step": ')[1].split(",")[0]) for text in (tmp_path / "fit.jsonl").read_text().splitlines()]
    assert steps == [*range(20, 230, 20), 230]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        f"step_{step:06d}" for step in (50, 100, 150, 200, 230)
    ]


def test_a_folder_that_goes_away_is_an_error_with_the_posterior_so_far(line, tmp_path):
    folder = tmp_path / "run"

    def remove(now):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    with pytest.raises(OSError, match="cannot be written") as caught:
        run(line, Checkpoint(folder, every=60), callbacks=[every(100, remove)])
    assert len(caught.value.posterior.losses) == 120


def test_marks_tell_what_a_model_is_made_of():
    def made(slope, hidden):
        def model(x, y=None):
            return slope * helper(x, hidden)

        return model

    assert not describe_differences(fingerprint_of(made(1.0, 2), "model"), fingerprint_of(made(1.0, 2), "model"))
    assert describe_differences(fingerprint_of(made(1.0, 2), "model"), fingerprint_of(made(1.5, 2), "model")) == [
        "model.slope is 1.0 there and 1.5 here"
    ]
    counts = []

    def counted(x, y=None):
        counts.append(x)

    counting = fingerprint_of(counted, "model")
    counted(1)  # what a model changes is not what it is
    assert counting == fingerprint_of(counted, "model")


def helper(x, hidden):
    return x * hidden


def test_nested_values_are_what_they_were():
    value = {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, "none": None, "text": ["a", float("-inf")]}
    content, tensors = flatten(value)
    back = unflatten(content, tensors)
    assert back[0]["betas"] == (0.9, 0.999)
    assert torch.equal(back[0]["step"], torch.tensor(3.0))
    assert (back["none"], back["text"]) == (None, ["a", float("-inf")])
    with pytest.raises(TypeError, match="a object is no number"):
        flatten({"what": object()})
    for hostile in ({"tensor": "9"}, {"dict": [[1]]}, {"a": 1, "b": 2}, {"float": "1e9"}, {"dict": [[[1], 2]]}):
        with pytest.raises(ValueError, match="nested value"):
            unflatten(hostile, {})
