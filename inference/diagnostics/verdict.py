"""A diagnosis in plain words: whether to rely on a fit, why, and what each of its checks means."""

from __future__ import annotations

import math
from dataclasses import dataclass

from inference.diagnostics.checks import NO_WEIGHTS, Check, Diagnosis, Topic

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
    topic: Topic


def verdict(diagnosis: Diagnosis) -> Verdict:
    """Say whether to rely on the posterior, in words for those who know no statistics."""
    failed = [check for check in diagnosis.checks if not check.passed]
    reasons = []
    for check in failed:
        plain = check.kind.failure
        known = bool(plain) and not math.isnan(check.value)
        reasons.append((plain, check.found) if known else (_sentence(check.found), ""))
    if not failed:
        sentence = "You can rely on this posterior: every check of it passed."
        return Verdict("good", "✓", sentence, tuple(reasons), diagnosis.advice)
    if all(check.kind is NO_WEIGHTS for check in failed):
        sentence = "This posterior cannot be checked: judge it by its predictions, on rows that were held out."
        return Verdict("open", "?", sentence, tuple(reasons), diagnosis.advice)
    return Verdict("bad", "✗", "Do not rely on this posterior yet.", tuple(reasons), diagnosis.advice)


def explain(check: Check) -> Explained:
    """The check as a reader meets it."""
    if check.passed:
        outcome = ("good", "✓", "passed")
    elif math.isnan(check.value):
        outcome = ("open", "?", "cannot be checked")
    else:
        outcome = ("bad", "✗", "failed")
    number, limit = (
        "none" if math.isnan(value) else form.format(value)
        for form, value in ((check.kind.number, check.value), (check.kind.limit, check.limit))
    )
    return Explained(*outcome, check.name, number, limit, _sentence(check.found), check.kind.meaning, check.kind.topic)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."
