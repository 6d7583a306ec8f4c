"""A diagnosis in plain words: whether to rely on a fit, why, and what each of its checks means."""

from __future__ import annotations

import math
from dataclasses import dataclass

from inference.diagnostics.checks import Check, Diagnosis

__all__ = ["Explained", "Verdict", "explain", "verdict"]


@dataclass(frozen=True)
class Verdict:
    """Advice on relying on a posterior: ``kind`` is good, bad or open, ``sign`` and ``sentence`` say so without colour.

    ``reasons`` are pairs, each in plain words and as the check found it, which is
    empty where that is plain enough; ``advice`` is what to try, the most promising first.
    """

    kind: str
    sign: str
    sentence: str
    reasons: tuple[tuple[str, str], ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Explained:
    """A check for a reader: its outcome by sign and word, the number, its limit, what was found and what it means."""

    kind: str
    sign: str
    word: str
    name: str
    number: str
    limit: str
    found: str
    means: str


@dataclass(frozen=True)
class _Words:
    number: str
    limit: str
    means: str
    failed: str


_WORDS = {
    "ELBO": _Words(
        "gain {:,.2f} nats",
        "at most {:,.2f}",
        "The ELBO is the score that fitting pushes up: while it still rises, a better answer is some steps away.",
        "The search had not finished: its score was still rising when it ended.",
    ),
    "R-hat of the steps": _Words(
        "{:.3f}",
        "below {:.2g}",
        "At the end of a search the steps should wander about one place: R-hat compares stretches of them with one "
        "another, and is 1 where they agree.",
        "The search had not finished: its last steps had not come to rest in one place.",
    ),
    "weights": _Words(
        "none",
        "none",
        "Importance weights compare the guide with the posterior draw by draw: without them only predictions can be "
        "checked, on rows that were held out.",
        "",
    ),
    "Pareto k-hat": _Words(
        "{:.2f}",
        "below {:.2f}",
        "How badly the guide misses the places where the posterior lies: the smaller the better, and above the limit "
        "what is corrected by weights means little.",
        "The approximation has the wrong shape: it misses part of what the data allow.",
    ),
    "effective sample size": _Words(
        "{:,.0f} draws",
        "at least {:,.0f}",
        "How many draws of the posterior the guide's draws are worth: with too few there is nothing to compare with.",
        "The approximation and the true posterior overlap too little to be compared.",
    ),
    "means": _Words(
        "{:.2f} sd",
        "at most {:.2f}, two standard errors included",
        "The best estimate of each unknown against a corrected one, in units of its own uncertainty; the worst counts.",
        "Best estimates may be off by a notable part of their uncertainty.",
    ),
    "standard deviations": _Words(
        "ratio {:.2f}",
        "1 ± {:.2f}, two standard errors included",
        "The stated uncertainty of each unknown over a corrected one: 1 is right, less is too sure, more is not sure "
        "enough; the worst counts.",
        "Stated uncertainties may be notably too small or too large.",
    ),
}


def verdict(diagnosis: Diagnosis) -> Verdict:
    """Say whether to rely on the posterior, in words for those who know no statistics."""
    failed = [check for check in diagnosis.checks if not check.passed]
    reasons = []
    for check in failed:
        plain = _WORDS[check.name].failed if check.name in _WORDS else ""
        known = bool(plain) and not math.isnan(check.value)
        reasons.append((plain, check.found) if known else (_sentence(check.found), ""))
    if not failed:
        sentence = "You can rely on this posterior: every check of it passed."
        return Verdict("good", "✓", sentence, tuple(reasons), diagnosis.advice)
    if all(check.name == "weights" for check in failed):
        sentence = "This posterior cannot be checked: judge it by its predictions, on rows that were held out."
        return Verdict("open", "?", sentence, tuple(reasons), diagnosis.advice)
    return Verdict("bad", "✗", "Do not rely on this posterior yet.", tuple(reasons), diagnosis.advice)


def explain(check: Check) -> Explained:
    """The check as a reader meets it."""
    words = _WORDS.get(check.name, _Words("{:.3g}", "{:.3g}", "", ""))
    if check.passed:
        outcome = ("good", "✓", "passed")
    elif math.isnan(check.value):
        outcome = ("open", "?", "cannot be checked")
    else:
        outcome = ("bad", "✗", "failed")
    number, limit = (
        "none" if math.isnan(value) else form.format(value)
        for form, value in ((words.number, check.value), (words.limit, check.limit))
    )
    return Explained(*outcome, check.name, number, limit, _sentence(check.found), words.means)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."
