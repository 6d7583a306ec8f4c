"""The verdict in plain words, each check explained, and the figures of what was seen."""

import re
from dataclasses import replace

import numpy as np
import pytest

from inference.diagnostics.checks import Check, CheckKind, NoWeights, Topic, diagnose
from inference.diagnostics.importance_sampling import Moments, moments, smoothed_weights
from inference.diagnostics.verdict import explain, verdict
from inference.optim.adaptive import StopReason
from inference.reporting.figures import diagnostic_plots
from inference.reporting.trust_section import trust_sections

FLAT = np.random.default_rng(0).normal(100, 3, 4000)
KL = np.full(len(FLAT), np.nan)
RISING = FLAT + np.linspace(20, 0, len(FLAT))
NONE = NoWeights("the guide is a point estimate", "fit a guide with a spread")
REST = StopReason(True, "after 900 steps", 1.02, 0.01)
NAMES = ("ELBO", "R-hat of the steps", "Pareto k-hat", "effective sample size", "means", "standard deviations")


def found(scale=1.02, loc=0.0, losses=FLAT, stop=REST, size=(5, 2000)):
    """The diagnosis of q = N(loc, scale²) where the posterior is N(0, 1)."""
    z = np.random.default_rng(1).normal(loc, scale, size)
    weights = -0.5 * z**2 + 0.5 * ((z - loc) / scale) ** 2 + np.log(scale)
    return diagnose(weights, losses, {"w": z.reshape(-1)}, stop)


def text(sections):
    return " ".join(f"{s.title} {s.reading} {' '.join(c.found + c.means for c in s.checks)}" for s in sections)


def test_the_verdict_is_one_of_three_and_says_so_without_colour():
    good, bad, open_ = (verdict(d) for d in (found(), found(0.4), diagnose(NONE, FLAT)))
    assert [v.kind for v in (good, bad, open_)] == ["good", "bad", "open"]
    assert [v.sign for v in (good, bad, open_)] == ["✓", "✗", "?"]
    assert good.sentence.startswith("You can rely on")
    assert (good.reasons, good.advice) == ((), ())
    assert bad.sentence == "Do not rely on this posterior yet."
    assert bad.advice
    assert "cannot be checked" in open_.sentence
    assert open_.reasons == (("The guide is a point estimate.", ""),)


def test_the_check_of_the_steps_leaves_the_weights_doubts_to_the_weights():
    stop = replace(REST, doubts=("the mean of w is off",))
    (check,) = (check for check in found(stop=stop).checks if check.name == "R-hat of the steps")
    assert check.found == "settled after 900 steps"
    assert stop.reason == "settled after 900 steps; but the guide is not the posterior: the mean of w is off"


def test_reasons_are_plain_words_with_what_was_found():
    plain, seen = verdict(found(losses=RISING)).reasons[0]
    assert plain == "The search had not finished: its score was still rising when it ended."
    assert "the ELBO was still rising, by 4.7" in seen
    assert not re.search("ELBO|k-hat|sd", plain)


def test_without_weights_a_search_that_had_not_finished_is_still_named():
    said = verdict(diagnose(NONE, RISING))
    assert said.kind == "bad"
    assert "point estimate" in said.reasons[0][0]
    assert "still rising" in said.reasons[1][0]


def test_every_check_of_a_diagnosis_is_explained():
    checks = [explain(check) for check in (*found().checks, *diagnose(NONE, FLAT).checks)]
    assert tuple(check.name for check in checks[:6]) == NAMES
    assert all(check.means for check in checks)
    assert {check.word for check in checks[:6]} == {"passed"}
    assert checks[6].word == "cannot be checked"
    assert (checks[2].number, checks[2].limit) == (f"{found().khat:.2f}", f"below {found().khat_threshold:.2f}")
    assert explain(Check(CheckKind("new", Topic.STEPS), 2.0, 1.0, False, "it is 2", "try")).found == "It is 2."


@pytest.mark.parametrize(("diagnosis", "pictures"), [(found(), 3), (found(0.3), 2), (diagnose(NONE, FLAT[:50]), 1)])
def test_the_sections_count_the_checks_and_draw_what_there_is(diagnosis, pictures):
    losses = FLAT if pictures > 1 else FLAT[:50]
    sections = list(trust_sections(diagnosis, losses, KL[: len(losses)]))
    passed = sum(check.passed for check in diagnosis.checks)
    assert sections[0].reading.startswith(f"Of {len(diagnosis.checks)} checks: ")
    assert (f"{passed} passed" in sections[0].reading) == (passed > 0)
    assert sum(section.figure is not None for section in sections) == pictures
    assert sum(len(section.checks) for section in sections) == len(diagnosis.checks)


def test_the_figures_stand_weights_that_are_infinite_or_none():
    z = np.random.default_rng(0).normal(size=(3, 200))
    for value in (np.inf, -np.inf, np.nan):
        weights = z.copy()
        weights[0, :] = value
        assert "</svg>" in diagnostic_plots.weights(diagnose(weights, FLAT).evidence, 0.6)


def test_at_most_forty_latents_are_shown_and_the_worst_first():
    rng = np.random.default_rng(0)
    draws = {f"w[{i}]": rng.normal(size=500) for i in range(60)}
    off = np.zeros(60)
    off[37], ones = 2.0, np.ones(60)
    table = Moments(tuple(draws), off, 0.01 * ones, ones, 0.01 * ones)
    shown = diagnostic_plots.worst_first(table)
    assert (len(shown), shown[0]) == (40, 37)
    weights = rng.normal(0, 0.1, 500)
    diagnosis = diagnose(weights[None], FLAT, draws)
    assert "The worst 40 of 60 unknowns" in text(trust_sections(diagnosis, FLAT, KL))


def test_the_moments_behind_the_worst_are_those_of_every_latent():
    rng = np.random.default_rng(0)
    z = rng.normal(0.3, 0.8, 20_000)
    other = rng.normal(size=20_000)
    table = moments(
        {"fixed": np.ones(20_000), "z": z, "other": other}, smoothed_weights(-0.5 * z**2 + 0.5 * ((z - 0.3) / 0.8) ** 2)
    )
    assert table.names == ("z", "other")
    # Each within five of its own standard errors of the truth.
    assert np.all(np.abs(table.mean - [0.3, 0]) < 5 * table.mean_se + 1e-9)
    assert np.all(np.abs(table.ratio - [0.8, 1]) < 5 * table.ratio_se + 1e-9)
    worst = table.worst()
    assert (worst.mean_at, worst.ratio_at) == ("z", "z")
    assert worst.mean == abs(table.mean[0])


def test_the_mean_log_weight_is_the_elbo():
    diagnosis = found(0.8, size=(5, 20_000))
    value, error = diagnosis.evidence.elbo
    # −KL(N(0, 0.8²) ‖ N(0, 1)), to which the constants of the two densities add nothing.
    assert abs(value - (np.log(0.8) - (0.64 - 1) / 2)) < 5 * error
    assert error < 0.01
