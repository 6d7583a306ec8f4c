"""Data and options of ``fit``: what is refused is named, what is taken is taken as the numbers that it means."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from hypothesis import strategies as st

from guides import mean_field_normal
from inference import fit
from ppl_models import linear_regression
from tests.faults.malformed import MATRICES, MEANT, ODD, WRONG, numbers
from tests.faults.outcomes import hold, outcome

FEW = 8
MODEL = partial(linear_regression, noise=1.0)
GUIDE = mean_field_normal(MODEL)


def examples(most):
    return pytest.mark.parametrize("examples", [FEW, pytest.param(most, marks=pytest.mark.slow)])


def losses(x, y, **options):
    return fit(MODEL, GUIDE, x, y, **{"steps": 2, "engine": "eager", "progress": False, **options}).losses


PAIRS = MATRICES.flatmap(lambda x: st.tuples(st.just(x), numbers(len(x))))
ARGUMENTS = st.sampled_from(["x", "y"])


@examples(700)
def test_what_means_the_same_numbers_gives_the_same_fit(examples):
    def same(case):
        (x, y), name, form = case
        given = {"x": x, "y": y} | {name: MEANT[form]({"x": x, "y": y}[name])}
        np.testing.assert_array_equal(losses(**given), losses(x, y), err_msg=f"{name} as {form}")

    hold(same, st.tuples(PAIRS, ARGUMENTS, st.sampled_from(sorted(MEANT))), examples)


@examples(700)
def test_what_means_no_numbers_is_refused_by_name(examples):
    pyro.clear_param_store()

    def refused(case):
        (x, y), name, form = case
        given = {"x": x, "y": y} | {name: WRONG[form]({"x": x, "y": y}[name])}
        done, words = outcome(lambda: losses(**given))
        assert done is None, f"{name} as {form} was fitted"
        assert f"{name} " in words or f"'{name}'" in words or "'linear_regression'" in words, words
        assert len(pyro.get_param_store()) == 0

    hold(refused, st.tuples(PAIRS, ARGUMENTS, st.sampled_from(sorted(WRONG))), examples)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@examples(500)
def test_only_rows_of_x_with_one_number_of_y_each_are_fitted(examples):
    def right(case):
        x, y = case
        done, words = outcome(lambda: losses(x, y))
        fits = x.ndim in (1, 2) and x.size and y.shape == x.shape[:1]
        assert (done is not None) == bool(fits), f"shapes {x.shape} and {y.shape}: {words}"

    hold(right, st.tuples(SHAPES.flatmap(numbers), SHAPES.flatmap(numbers)), examples)


@examples(300)
def test_numbers_of_any_size_give_finite_losses_or_an_error(examples):
    def right(case):
        done, words = outcome(lambda: losses(*case))
        assert np.isfinite(done).all() if done is not None else "x " in words or "'y'" in words or "y " in words

    any_float = st.floats(allow_nan=True, allow_infinity=True)
    drawn = st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.lists(any_float, min_size=n, max_size=n).map(lambda v: np.array(v)[:, None]),
            st.lists(any_float, min_size=n, max_size=n).map(np.array),
        )
    )
    hold(right, drawn, examples)


def whole(value):
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 1 <= value < 2**31


def is_word(value, *words):
    return isinstance(value, str) and value in words


def is_number(value):
    known = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return known and value > 0 and (value < 10**300 if isinstance(value, int) else float(value) < math.inf)


TAKEN = {
    "steps": whole,
    "particles": whole,
    "restarts": whole,
    "batch_size": lambda v: v is None or whole(v),
    "seed": lambda v: isinstance(v, int | np.integer) and not isinstance(v, bool) and 0 <= v < 2**32,
    "lr": lambda v: v is None or is_number(v) or v is int,
    "optimizer": lambda v: v is None or is_word(v, "adam", "adamw", "clippedadam", "sgd"),
    "init": lambda v: is_word(v, "auto", "mode", "prior"),
    "stop": lambda v: is_word(v, "auto", "steps"),
    "device": lambda v: is_word(v, "auto", "cpu"),
    "dtype": lambda v: v is None or is_word(v, "float32", "float64"),
    "engine": lambda v: is_word(v, "auto", "eager"),
    "anneal": lambda v: v is None or (whole(v) and v < 2) or v is int,
    "progress": lambda v: isinstance(v, bool | np.bool_),
    "callbacks": lambda v: False,
}
WORDS = st.sampled_from(["auto", "adam", "sgd", "cpu", "eager", "steps", "prior", "float64", "AUTO", "cuda:7", "cpu "])
X, Y = np.linspace(-1, 1, 5)[:, None], np.linspace(0, 1, 5)


@examples(1000)
def test_an_option_is_taken_or_refused_by_name(examples, capsys):
    def right(case):
        name, value = case
        if name == "optimizer" and is_word(value, "auto"):
            return
        done, words = outcome(lambda: losses(X, Y, **{name: value}))
        if done is None and TAKEN[name](value):
            assert name == "lr", f"{name}={value!r} was refused: {words}"  # steps that are too large for the density
            assert "at step" in words
        elif done is None:
            assert name in words
        else:
            assert TAKEN[name](value), f"{name}={value!r} was taken"

    hold(right, st.tuples(st.sampled_from(sorted(TAKEN)), ODD | WORDS), examples)
    capsys.readouterr()


def test_whole_numbers_of_numpy_mean_the_same(line):
    options = {"steps": 3, "particles": 2, "batch_size": 4, "seed": 5, "restarts": 2}
    plain = losses(line.x, line.y, **options)
    np.testing.assert_array_equal(losses(line.x, line.y, **{n: np.int16(v) for n, v in options.items()}), plain)


def test_the_property_fails_where_nobody_looks_for_what_is_not_finite(monkeypatch):
    monkeypatch.setattr("inference.data.arguments._is_finite", lambda tensor: True)
    with pytest.raises(AssertionError, match=r"'linear_regression'|'y'|Kiln"):
        test_numbers_that_are_not_there_are_caught()


def test_numbers_that_are_not_there_are_caught():
    _, words = outcome(lambda: losses(WRONG["holds nan"](X), Y))
    assert words is not None, "Kiln fitted a NaN"
    assert words.startswith("x has 1 values that are NaN"), words


def test_the_property_fails_where_broadcasting_is_let_through(monkeypatch, unshrunk):
    monkeypatch.setattr("inference.model.bound_model.refuse_broadcast", lambda name, node: None)
    with pytest.raises(AssertionError, match=r"shapes|Kiln"):
        test_only_rows_of_x_with_one_number_of_y_each_are_fitted(300)


def test_the_property_fails_where_a_mask_is_forgotten(monkeypatch):
    monkeypatch.setattr("inference.data.arguments._unmasked", lambda array, name: np.asarray(array.data))
    masked = WRONG["masked"](X)
    assert outcome(lambda: losses(masked, Y))[0] is not None


def test_an_own_error_is_told_from_a_bare_one():
    with pytest.raises(AssertionError, match="no error of Kiln's"):
        outcome(lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(AssertionError, match="not by Kiln"):
        outcome(lambda: int("x"))
