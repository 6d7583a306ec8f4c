"""New rows and options of a fitted posterior, and of ``load``: refused by name, or answered as the plain ones are."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from guides import mean_field_normal
from inference import fit, load
from ppl_models import linear_regression
from tests.faults.malformed import MATRICES, MEANT, ODD, WRONG, numbers
from tests.faults.outcomes import hold, outcome
from tests.faults.test_malformed_fit import examples, is_number, whole

MODEL = partial(linear_regression, noise=1.0)
GUIDE = mean_field_normal(MODEL)
X, Y = np.linspace(-1, 1, 10).reshape(5, 2), np.linspace(0, 1, 5)


@pytest.fixture(scope="module")
def posterior():
    return fit(MODEL, GUIDE, X, Y, steps=2, engine="eager", progress=False)


@pytest.fixture(scope="module")
def saved(posterior, tmp_path_factory):
    return posterior.save(tmp_path_factory.mktemp("saved") / "run")


ROWS = st.integers(1, 5).flatmap(lambda n: st.tuples(numbers((n, 2)), numbers(n)))


def answers(posterior, x, y):
    found = posterior.evaluate(x, y, draws=5, progress=False)
    likelihood = posterior.log_likelihood(x, y, draws=5)["y"]
    return [posterior.predict(x, draws=5, progress=False).samples, found.scores.pit, likelihood]


@examples(400)
def test_what_means_the_same_numbers_gives_the_same_answers(examples, posterior):
    def same(case):
        (x, y), name, form = case
        given = {"x": x, "y": y} | {name: MEANT[form]({"x": x, "y": y}[name])}
        for found, plain in zip(answers(posterior, **given), answers(posterior, x, y), strict=True):
            assert torch.equal(found, plain), f"{name} as {form}"

    hold(same, st.tuples(ROWS, st.sampled_from(["x", "y"]), st.sampled_from(sorted(MEANT))), examples)


ASKED = {
    "predict": lambda p, x, y: p.predict(x, draws=5, progress=False),
    "evaluate": lambda p, x, y: p.evaluate(x, y, draws=5, progress=False),
    "log_likelihood": lambda p, x, y: p.log_likelihood(x, y, draws=5),
}


@examples(400)
def test_what_means_no_numbers_is_refused_by_name(examples, posterior):
    def refused(case):
        (x, y), question, name, form = case
        name = "x" if question == "predict" else name
        given = {"x": x, "y": y} | {name: WRONG[form]({"x": x, "y": y}[name])}
        done, words = outcome(lambda: ASKED[question](posterior, **given))
        if form == "a row too many" and question == "predict":
            assert len(done.mean) == len(x) + 1
            return
        assert done is None, f"{question} took {name} as {form}"
        assert f"{name} " in words, words

    questions, forms = st.sampled_from(sorted(ASKED)), st.sampled_from(sorted(WRONG))
    hold(refused, st.tuples(ROWS, questions, st.sampled_from(["x", "y"]), forms), examples)


def is_seed(value):
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= value < 2**32


def is_flag(value):
    return isinstance(value, bool | np.bool_)


def maybe(taken):
    return lambda value: value is None or taken(value)


OPTIONS = {
    ("predict", "draws"): whole,
    ("predict", "seed"): is_seed,
    ("predict", "site"): maybe(lambda v: isinstance(v, str) and v == "y"),
    ("predict", "batch_size"): maybe(whole),
    ("predict", "per_row"): lambda v: is_flag(v) and not v,
    ("predict", "progress"): is_flag,
    ("evaluate", "draws"): maybe(whole),
    ("evaluate", "seed"): is_seed,
    ("log_likelihood", "draws"): whole,
    ("log_likelihood", "batch_size"): maybe(whole),
    ("sample", "draws"): whole,
    ("sample", "seed"): is_seed,
    ("prior", "draws"): whole,
    ("prior", "rows"): maybe(whole),
    ("log_weights", "seed"): is_seed,
    ("diagnose", "repeats"): whole,
    ("interval", "prob"): lambda v: is_number(v) and v < 1,
    ("interval", "of"): lambda v: isinstance(v, str) and v in ("observations", "functions"),
}
GIVEN = {
    "predict": ((X,), {"draws": 4, "progress": False}),
    "evaluate": ((X, Y), {"draws": 4, "progress": False}),
    "log_likelihood": ((X, Y), {"draws": 4}),
    "diagnose": ((), {"draws": 20, "repeats": 1}),
    "interval": ((), {}),
}


@examples(700)
def test_an_option_is_taken_or_refused_by_name(examples, posterior):
    prediction = posterior.predict(X, draws=5, progress=False)

    def right(case):
        (question, name), value = case
        arguments, options = GIVEN.get(question, ((), {"draws": 4}))
        asked = getattr(prediction if question == "interval" else posterior, question)
        done, words = outcome(lambda: asked(*arguments, **{**options, name: value}))
        assert (done is not None) == bool(OPTIONS[question, name](value)), f"{question}({name}={value!r}): {words}"
        assert words is None or name in words or ("draws" in name and "value of every latent" in words)

    words = st.sampled_from(["y", "weights", "observations", "functions"])
    hold(right, st.tuples(st.sampled_from(sorted(OPTIONS)), ODD | words), examples)


@examples(200)
def test_draws_that_are_given_are_checked_site_by_site(examples, posterior):
    drawn = posterior.sample(4)

    def right(case):
        name, value, form = case
        array = value if form is None else WRONG[form](value) if form in WRONG else MEANT[form](value)
        done, words = outcome(lambda: posterior.predict(X, draws={**drawn, name: array}, progress=False))
        wanted = (4, *drawn[name].shape[1:])
        if done is None:
            assert name in words
        else:
            assert value.shape == wanted
            assert form not in WRONG or form == "tuple"
            assert torch.isfinite(done.mean).all()

    values = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple).flatmap(numbers)
    forms = st.none() | st.sampled_from(sorted(WRONG)) | st.sampled_from(sorted(MEANT))
    hold(right, st.tuples(st.sampled_from(sorted(drawn)), values, forms), examples)


PLACES = {
    "nothing": lambda run, place: place / "nothing",
    "a file": lambda run, place: Path(shutil.copy(run / "posterior.json", place / "file")),
    "an empty folder": lambda run, place: place,
    "a folder of folders": lambda run, place: [(place / f.name).mkdir() for f in run.iterdir()] and place,
    "half of it": lambda run, place: Path(shutil.copy(run / "posterior.json", place)).parent,
    "a long name": lambda run, place: place / ("a" * 300),
    "under a file": lambda run, place: Path(shutil.copy(run / "posterior.json", place / "file")) / "run",
}


@pytest.mark.parametrize("where", PLACES)
def test_a_place_that_holds_no_posterior_is_named(saved, tmp_path, where):
    done, words = outcome(lambda: load(PLACES[where](saved, tmp_path), MODEL, GUIDE))
    assert done is None
    assert "a" * 99 in words or str(tmp_path) in words


@examples(150)
def test_load_takes_the_data_of_the_fit_in_any_form_that_means_it(examples, saved):
    def right(case):
        name, form = case
        given = {"x": X.round(), "y": Y.round()}
        wrong = form in WRONG
        given[name] = (WRONG if wrong else MEANT)[form](np.abs(given[name]))
        done, words = outcome(lambda: load(saved, MODEL, GUIDE, *given.values()))
        assert (done is None) == wrong, words
        assert words is None or f"{name} " in words or "'linear_regression'" in words

    hold(right, st.tuples(st.sampled_from(["x", "y"]), st.sampled_from(sorted({**WRONG, **MEANT}))), examples)


@examples(100)
def test_other_columns_than_those_of_the_fit_are_refused(examples, posterior):
    def refused(x):
        _, words = outcome(lambda: posterior.predict(x, draws=2, progress=False))
        assert words is not None
        assert words.startswith("x has shape"), words

    hold(refused, MATRICES.filter(lambda x: x.shape[1] != 2), examples)


def test_the_property_fails_where_data_is_not_compared_with_the_fit(posterior, monkeypatch, unshrunk):
    monkeypatch.setattr("inference.predictive.approximation.check_new_shapes", lambda *arguments: None)
    with pytest.raises(AssertionError):
        test_other_columns_than_those_of_the_fit_are_refused(20, posterior)
