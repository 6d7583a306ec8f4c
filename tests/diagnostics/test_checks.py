import numpy as np
import pytest

from inference.diagnostics.checks import NoWeights, diagnose
from inference.diagnostics.importance_sampling import khat_threshold, pareto_khat
from inference.optim.convergence import convergence

DRAWS = 2000
FLAT = np.random.default_rng(0).normal(100, 3, 4000)


def log_weights(scale, seed):
    """log p/q for p = N(0, 1), q = N(0, scale²)."""
    z = np.random.default_rng(seed).normal(0, scale, DRAWS)
    return -0.5 * z**2 + 0.5 * (z / scale) ** 2 + np.log(scale)


@pytest.mark.parametrize("scale", [0.5, 0.7, 0.95])
def test_khat_of_a_narrow_normal_is_one_less_its_variance(scale):
    khats = [pareto_khat(log_weights(scale, seed)) for seed in range(40)]
    # The mean of 40 repeats, against their own spread; PSIS shrinks k by its prior, a bias of about 0.05.
    assert np.mean(khats) == pytest.approx(1 - scale**2, abs=5 * np.std(khats) / 40**0.5 + 0.06)


def test_the_threshold_grows_with_the_draws():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(2000) == pytest.approx(0.697, abs=1e-3)
    assert khat_threshold(10**5) == 0.7


def test_a_guide_near_the_posterior_is_trusted_and_a_narrow_one_is_not():
    good = diagnose(np.stack([log_weights(0.95, s) for s in range(5)]), FLAT)
    assert good.trusted
    assert good.reasons == ()
    assert good.khat < good.khat_threshold
    bad = diagnose(np.stack([log_weights(0.4, s) for s in range(5)]), FLAT)
    assert not bad.trusted
    assert "k-hat" in bad.reasons[0]
    assert bad.advice


def test_a_rising_elbo_is_not_trusted_whatever_khat_says():
    rising = FLAT + np.linspace(20, 0, len(FLAT))
    verdict = diagnose(np.stack([log_weights(0.95, s) for s in range(5)]), rising)
    assert not verdict.trusted
    assert "still rising" in verdict.reasons[0]
    # The mean gain over a quarter of the steps is a quarter of the fall.
    assert verdict.convergence.gain == pytest.approx(5, abs=4 * verdict.convergence.gain_se)


def test_a_flat_elbo_is_called_rising_at_the_stated_rate():
    rng = np.random.default_rng(1)
    called = sum(not convergence(rng.normal(0, 10, 2000)).converged for _ in range(400))
    # Two standard errors, one-sided, with 38 degrees of freedom: 2.6 % of 400 is 10, and 25 lies 4.7 sd above.
    assert called < 25


def test_too_few_steps_and_infinite_weights_are_reasons():
    assert "too few" in diagnose(NoWeights("no spread", "another guide"), FLAT[:50]).reasons[1]
    weights = log_weights(0.95, 0)
    weights[3] = np.inf
    assert diagnose(weights[None], FLAT).khat == np.inf
