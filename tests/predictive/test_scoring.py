"""Predictive calibration: exact values, forecasts that are calibrated, and over-confident ones that must be caught."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from inference import Labels
from inference.diagnostics.uniformity_tests import ecdf_p_value, thresholds
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.scoring import HeldOut, brier_score, class_scores, pit_values, reliability, scores
from inference.reporting.held_out_section import held_out_sections

DRAWS, ROWS = 500, 2000


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forecasts(width=1.0, shift=0.0):
    """Draws of N(μ, width²) for observations of N(μ, 1)."""
    centre = noise(ROWS, seed=1)
    return centre + shift + width * noise(DRAWS, ROWS), centre + noise(ROWS, seed=2)


def test_the_crps_of_a_normal_is_its_closed_form():
    samples, y = noise(4000, 1).expand(4000, 9), torch.linspace(-2, 2, 9)
    z = y.double().numpy()
    exact = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi)
    # |Y − y| has a standard deviation of at most 1, the spread term less: five errors of 4,000 draws.
    np.testing.assert_allclose(pit_values(samples, y).crps.numpy(), exact, atol=5 / 4000**0.5)


def test_the_crps_has_no_bias_however_few_the_draws():
    y = noise(200_000, seed=3)
    found = pit_values(noise(3, 200_000), y).crps
    # The mean of 200,000 rows about 1/√π: for forecaster and observation both N(0, 1).
    assert abs(float(found.mean()) - 1 / math.sqrt(math.pi)) < 5 * float(found.std()) / 200_000**0.5


def test_the_crps_is_the_mean_of_all_pairs_and_one_draw_has_none():
    samples, y = noise(7, 3), noise(3, seed=5)
    pairs = (samples[:, None] - samples).abs().sum((0, 1)) / (2 * 7 * 6)
    torch.testing.assert_close(pit_values(samples, y).crps, ((samples - y).abs().mean(0) - pairs).double())
    assert torch.isnan(pit_values(samples[:1], y).crps).all()


def test_rows_are_compared_in_parts_as_all_at_once(monkeypatch):
    samples, y = noise(20, 50, 2), noise(50, 2, seed=5)
    whole = pit_values(samples, y)
    monkeypatch.setattr("inference.predictive.scoring._TOGETHER", 20 * 7)
    parts = pit_values(samples, y)
    assert whole.pit.shape == (100,)
    torch.testing.assert_close(parts.crps, whole.crps)
    assert parts.coverage == whole.coverage


@pytest.mark.parametrize(
    ("width", "shift", "calibrated"), [(1, 0, True), (0.8, 0, False), (1.3, 0, False), (1, 0.2, False)]
)
def test_pit_and_coverage_pass_calibrated_forecasts_and_fail_others(width, shift, calibrated):
    found = pit_values(*forecasts(width, shift))
    # A false alarm once in a thousand.
    assert (ecdf_p_value(found.pit.numpy(), thresholds()) > 1e-3) == calibrated
    held = [abs(c.share - c.prob) < 4 * c.standard_error for c in found.coverage]
    assert all(held) == calibrated or shift


@pytest.mark.parametrize(("rate", "calibrated"), [(2.0, True), (2.4, False)])
def test_the_pit_of_counts_is_uniform_too(rate, calibrated):
    y = torch.poisson(torch.full((ROWS,), 2.0), generator=torch.Generator().manual_seed(1))
    samples = torch.poisson(torch.full((DRAWS, ROWS), rate), generator=torch.Generator().manual_seed(2))
    assert (ecdf_p_value(pit_values(samples, y).pit.numpy(), thresholds()) > 1e-3) == calibrated


def test_ties_are_those_of_the_draws_own_type():
    assert float(pit_values(torch.full((99, 1), 0.1), torch.tensor([0.1], dtype=torch.float64)).crps) == 0
    with pytest.raises(ValueError, match=r"y has shape \(4, 1\), the predictions \(4,\)"):
        pit_values(noise(9, 4), noise(4, 1))


def classes(rows=4000, sharper=1.0):
    """Probabilities of three classes, classes drawn from them, and what is claimed: a sharper version."""
    logits = 1.5 * noise(rows, 3).double()
    generator = torch.Generator().manual_seed(4)
    y = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return (sharper * logits).softmax(-1), y


def test_brier_score_and_reliability_are_those_of_scikit_learn():
    probs, y = classes()
    assert brier_score(probs, y) == pytest.approx(brier_score_loss(y.numpy(), probs.double().numpy()), abs=1e-6)
    found = reliability(probs, y, bins=10)
    confidence, labels = probs.double().max(-1)
    right, mean = calibration_curve((labels == y).numpy(), confidence.numpy(), n_bins=10)
    np.testing.assert_allclose(found.right.numpy(), right)
    np.testing.assert_allclose(found.confidence.numpy(), mean)
    assert int(found.counts.sum()) == len(y)
    assert found.error == pytest.approx(float(np.sum(found.counts.numpy() / len(y) * np.abs(right - mean))))


@pytest.mark.parametrize(("sharper", "calibrated"), [(1.0, True), (1.5, False), (0.7, False)])
def test_calibrated_probabilities_are_believed_and_sharper_ones_are_not(sharper, calibrated):
    found = reliability(*classes(sharper=sharper))
    # Two-sided, 4 standard errors: a false alarm in 16,000.
    assert (abs(found.excess) < 4 * found.excess_se) == calibrated
    if not calibrated:
        assert (found.excess > 0) == (sharper > 1)


@pytest.mark.parametrize(
    ("width", "shift", "said"),
    [(1.0, 0.0, "here they are, as far"), (0.6, 0.0, "too narrow"), (2.0, 0.0, "too wide"), (1.0, 0.5, "shifted up")],
)
def test_the_report_says_what_is_seen_of_a_regression(width, shift, said):
    samples, y = forecasts(width, shift)
    prediction = Prediction("y", samples, samples, torch.zeros(ROWS))
    held_out = HeldOut(prediction, y, scores(prediction, y, torch.zeros(4, ROWS)), ())
    _, pit, coverage = held_out_sections(held_out, {}, Labels())
    assert said in pit.reading
    if width < 1:
        assert "the 90% interval holds" in coverage.reading
    if width == 1 and not shift:
        assert "all four" in coverage.reading
    assert all(section.figure and section.figure_label for section in (pit, coverage))


@pytest.mark.parametrize(
    ("sharper", "said"), [(1.0, "neither too high nor too low"), (2.0, "too high"), (0.5, "too low")]
)
def test_the_report_says_what_is_seen_of_classes(sharper, said):
    probs, y = classes(sharper=sharper)
    prediction = ClassPrediction("y", probs[None], torch.zeros(1, len(y)))
    _, section = held_out_sections(HeldOut(prediction, y, class_scores(prediction, y), ()), {}, Labels())
    assert said in section.reading
    assert section.figure_label == "reliability diagram"
