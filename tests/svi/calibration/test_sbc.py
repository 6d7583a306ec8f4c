"""Simulation-based calibration: an exact guide passes, a shifted and a narrow one fail, and the machinery around it."""

import json
from dataclasses import replace
from functools import partial

import joblib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy.stats import kstest

from guides import full_rank_normal, mean_field_normal
from inference import calibrate
from inference.diagnostics.uniformity_tests import Shape, ecdf_band, ecdf_p_value, holm, symmetry_p_value, thresholds
from inference.reporting.figures.style import as_svg
from inference.svi.calibration.sbc import Calibration
from inference.svi.calibration.simulation import Outcome, _rank
from ppl_models import exact_linear_regression, linear_regression

NOISE = 0.5
MODEL = partial(linear_regression, noise=NOISE)
X = torch.stack([torch.linspace(0, 1, 20), torch.linspace(0, 1, 20).square()], 1)
Y = torch.zeros(20)
FEW = {"fits": 6, "draws": 19, "steps": 1, "progress": False}


def conjugate(model, shift=0.0, width=1.0):
    """A guide that is the posterior itself, or one ``shift`` standard deviations off and ``width`` times as wide."""

    def guide(x, y=None):
        exact = exact_linear_regression(x, y, noise=NOISE)
        moved = exact.mean + shift * exact.covariance.diagonal().sqrt()
        replace(exact, mean=moved, covariance=width**2 * exact.covariance).guide()

    return guide


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, None), ({"shift": 0.8}, "shifted up"), ({"shift": -0.8}, "shifted down"), ({"width": 0.5}, "too narrow")],
)
def test_the_posterior_itself_passes_and_others_fail(options, said):
    """At the stated rate an exact guide fails once in a hundred seeds; a mean of 60 ranks is six errors off."""
    fits = 60 if options else 100
    found = calibrate(MODEL, partial(conjugate, **options), X, Y, fits=fits, steps=1, progress=False)
    assert found.passed == (said is None)
    assert len(found.reasons) == (0 if said is None else 3)
    assert all(said in reason for reason in found.reasons)
    if options.get("width"):
        assert (found.symmetry > 0.01 / 3).all()


def test_p_values_are_uniform_for_uniform_ranks_so_that_error_rates_are_as_stated():
    rng = np.random.default_rng(0)
    points, repeats = thresholds(99), 500
    columns = [(rng.integers(0, 100, 60) + 0.5) / 100 for _ in range(repeats)]
    uniformity = np.array([ecdf_p_value(column, points) for column in columns])
    symmetry = np.array([symmetry_p_value(column) for column in columns])
    for p in (uniformity, symmetry):
        for rate in (0.01, 0.05, 0.2):
            assert np.mean(p <= rate) <= rate + 4 * np.sqrt(rate * (1 - rate) / repeats)
    # Exact, not merely careful: within four errors of the nominal rate where ties are no matter.
    assert np.mean(uniformity <= 0.2) > 0.2 - 0.05 - 4 * np.sqrt(0.16 / repeats)
    assert kstest(uniformity, "uniform").statistic < 0.1
    band = ecdf_band(60, points, 0.05)
    counts = np.array([np.searchsorted(np.sort(column), points) for column in columns])
    left = ((counts < band[0]) | (counts > band[1])).any(1)
    assert left.mean() <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / repeats)
    assert np.array_equal(left, uniformity <= uniformity[left].max())


def test_a_family_of_exact_parameters_fails_at_most_at_the_error_rate():
    rng = np.random.default_rng(1)
    repeats, rate = 150, 0.1
    failed = sum(not calibration_of(rng.integers(0, 20, (40, 4)), rate).passed for _ in range(repeats))
    assert failed <= repeats * rate + 4 * np.sqrt(repeats * rate * (1 - rate))
    assert failed > 0


def calibration_of(ranks, rate=0.01, draws=19, failures=()):
    """A calibration of these ranks."""
    points = thresholds(draws)
    columns = ((ranks + 0.5) / (draws + 1)).T
    p = np.array([[ecdf_p_value(c, points) for c in columns], [symmetry_p_value(c) for c in columns]])
    names = tuple(f"w[{i}]" for i in range(len(columns)))
    return Calibration(names, ranks, draws, failures, rate, *p, holm(p.ravel()).reshape(2, -1))


@pytest.mark.parametrize(
    ("power", "words"),
    [
        (lambda u: u, ()),
        (lambda u: u**2, ("shifted up",)),
        (lambda u: 1 - u**2, ("shifted down",)),
        (lambda u: 0.5 + 0.5 * np.sign(u - 0.5) * np.abs(2 * u - 1) ** 0.4, ("too narrow",)),
        (lambda u: 0.5 + 0.5 * np.sign(u - 0.5) * np.abs(2 * u - 1) ** 3, ("too wide",)),
    ],
)
def test_shapes_have_names(power, words):
    assert Shape.of(power((np.arange(400) + 0.5) / 400)).words[:1] == words


def test_symmetry_says_nothing_of_width_and_holm_is_what_it_should_be():
    narrow = np.r_[np.full(50, 0.02), np.full(50, 0.98)]
    assert symmetry_p_value(narrow) == 1
    # Ten signs alike: 2 · 2⁻¹⁰.
    assert symmetry_p_value(np.linspace(0.6, 0.9, 10)) == pytest.approx(2 / 2**10)
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03, 0.9])), [0.09, 0.04, 0.09, 0.9])


@pytest.mark.slow
def test_numbers_depend_on_seed_and_number_alone():
    before = torch.get_rng_state(), torch.get_num_threads()
    pyro.param("mine", torch.tensor(3.0))
    one = calibrate(MODEL, mean_field_normal, X, Y, **FEW | {"steps": 20})
    with joblib.parallel_config(backend="loky"):
        many = calibrate(MODEL, mean_field_normal, X, Y, **FEW | {"steps": 20, "fits": 3, "n_jobs": 2})
    other = calibrate(MODEL, mean_field_normal, X, Y, **FEW | {"steps": 20, "fits": 3, "seed": 1})
    assert np.array_equal(one.ranks[:3], many.ranks)
    assert not np.array_equal(many.ranks, other.ranks)
    assert one.names == ("bias", "weights[0]", "weights[1]")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_num_threads()
    assert dict(pyro.get_param_store().items()).keys() == {"mine"}
    pyro.clear_param_store()


def test_threads_are_refused():
    with (
        joblib.parallel_config(backend="threading", n_jobs=2),
        pytest.raises(ValueError, match="threads, which share torch's random numbers"),
    ):
        calibrate(MODEL, conjugate, X, Y, **FEW)


def test_a_broken_run_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = calibrate(MODEL, conjugate, X, Y, **FEW)
    calibrate(MODEL, conjugate, X, Y, **FEW | {"fits": 4}, path=tmp_path / "kept")
    files = sorted((tmp_path / "kept").glob("fit_*.json"))
    assert len(files) == 4
    files[1].unlink()
    ran = []
    monkeypatch.setattr("inference.svi.calibration.simulation._rank", spy(ran))
    again = calibrate(MODEL, conjugate, X, Y, **FEW, path=tmp_path / "kept")
    assert len(ran) == 3 * len(whole.names)
    assert np.array_equal(again.ranks, whole.ranks)
    files[0].write_text("{")
    with pytest.raises(ValueError, match=r"fit_000000\.json is damaged.*delete it"):
        calibrate(MODEL, conjugate, X, Y, **FEW, path=tmp_path / "kept")


def spy(calls):
    """The rank, and a note that it was taken."""

    def rank(*arguments):
        calls.append(arguments)
        return _rank(*arguments)

    return rank


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"draws": 39}, "draws is 19 there and 39 here"),
        ({"steps": 2}, "options is {'steps': 1} there and {'steps': 2} here"),
        ({"builder": mean_field_normal}, "guide is conjugate there and mean_field_normal here"),
        ({"builder": partial(conjugate, shift=1.0)}, r"conjugate there and conjugate\(shift=1.0\) here"),
        ({"x": 2 * X}, "inputs is"),
    ],
)
def test_a_folder_of_another_calibration_is_refused(tmp_path, change, told):
    calibrate(MODEL, conjugate, X, Y, **FEW | {"fits": 1}, path=tmp_path)
    assert json.loads((tmp_path / "calibration.json").read_text())["parameters"] == ["bias", "weights[0]", "weights[1]"]
    builder, x = change.pop("builder", conjugate), change.pop("x", X)
    with pytest.raises(ValueError, match=told):
        calibrate(MODEL, builder, x, Y, **FEW | {"fits": 1} | change, path=tmp_path)


def counts(x, y=None):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Poisson(rate * x), obs=y)


def right_or_fails(model):
    """The conjugate posterior of ``counts``, which does not like large counts."""

    def guide(x, y=None):
        total = float(y.sum())
        if total > 40:
            raise RuntimeError("too many for me")
        pyro.sample("rate", dist.Gamma(2.0 + total, 1.0 + x.sum()))

    return guide


def test_fits_that_fail_are_counted_and_speak_against_it(tmp_path):
    x = torch.ones(10)
    found = calibrate(counts, right_or_fails, x, x, fits=30, draws=19, steps=1, progress=False, path=tmp_path)
    assert 0 < found.failed < 15
    assert len(found.ranks) == 30 - found.failed
    assert not found.passed
    assert f"{found.failed} of 30 fits failed" in found.reasons[-1]
    assert "too many for me" in str(found)
    again = calibrate(counts, right_or_fails, x, x, fits=30, draws=19, steps=1, progress=False, path=tmp_path)
    assert again.failures == found.failures
    with pytest.raises(ValueError, match="all 2 fits failed, the first with: "):
        Calibration.of(None, [Outcome(0, None, "no"), Outcome(1, None, "no")], 0.01)


def flat(x, y=None):
    slope = pyro.sample("slope", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope, 1.0), obs=y)


def scaled(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=None if y is None else y / 2)


def needs_y(x, y):
    w = pyro.sample("w", dist.Normal(y.mean(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "data", "options", "told"),
    [
        (flat, (X, Y + 1), {}, "site 'slope' of the model 'flat' has a flat prior.*proper"),
        (scaled, (X, Y + 1), {}, "site 'y' observes something made from the arguments"),
        (needs_y, (X, Y), {}, "the model 'needs_y' could not run"),
        (counts, (X[:, 0],), {}, "the model .counts. observes nothing"),
        (counts, (X[:, 0], Y), {"step": 3}, "'step' is no option of calibrate"),
        (counts, (X[:, 0], Y), {"callbacks": ()}, "'callbacks' is no option"),
        (counts, (X[:, 0], Y), {"error_rate": 1}, "error_rate is 1"),
        (counts, (X[:, 0], Y), {"fits": 0}, "fits is 0"),
    ],
)
def test_what_cannot_be_simulated_is_refused(model, data, options, told):
    with pytest.raises(ValueError, match=told):
        calibrate(model, AutoNormal, *data, **FEW | options)


@pytest.mark.parametrize(("builder", "told"), [(lambda model: None, "returned NoneType"), (lambda x, y: x, "failed")])
def test_what_is_no_builder_is_refused(builder, told):
    with pytest.raises(ValueError, match=f"guide builder '<lambda>' {told}.*called as guide_builder.model."):
        calibrate(MODEL, builder, X, Y, **FEW)


def durations(x, y=None):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


def test_of_the_observations_only_the_shape_is_used():
    found = [calibrate(durations, AutoNormal, X, y, **FEW).ranks for y in (Y - 1, Y + 1)]
    assert np.array_equal(*found)


def alone(y):
    """A model whose observations alone say how many rows there are."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def test_rows_may_be_known_from_the_observations_alone_and_ties_are_broken_at_random():
    assert calibrate(alone, AutoNormal, Y, **FEW).ranks.shape == (6, 1)
    found = calibrate(alone, lambda model: lambda y: pyro.sample("w", dist.Delta(torch.tensor(0.0))), Y, **FEW)
    assert set(found.ranks.ravel()) <= {0, 19}


def test_it_says_what_it_found_and_draws_it():
    ranks = np.random.default_rng(0).integers(0, 20, (80, 10))
    ranks[:, 4] = ranks[:, 4] // 4
    found = calibration_of(ranks)
    assert str(found).startswith("80 fits, 19 draws each: not calibrated at an error rate of 0.01 (20 tests by Holm")
    assert found.reasons[0].startswith("w[4]: posterior shifted up")
    figure = found.plot(most=3)
    assert len(figure.axes) == 6
    assert figure.axes[0].get_title(loc="left").startswith("w[4]")
    assert as_svg(figure).count("<path") > 50
    assert "nothing found against it" in str(calibration_of(np.delete(ranks, 4, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(("builder", "passes"), [(full_rank_normal, True), (mean_field_normal, False)])
def test_two_hundred_fits(builder, passes, empty_cache):
    """A fitted full-rank Normal is exact here; a mean-field one is too narrow, as the columns are correlated."""
    options = {"steps": 3000, "lr": 0.02, "particles": 4, "engine": "compiled", "n_jobs": 2, "progress": False}
    found = calibrate(MODEL, builder, X, Y, fits=200, **options)
    assert found.failed == 0
    assert found.passed == passes, str(found)
    assert len(list((empty_cache / "programs").iterdir())) == 1  # compiled once, for all fits
    if not passes:
        assert all("too narrow" in reason for reason in found.reasons)
