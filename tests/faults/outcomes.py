"""What may come of an input that may be malformed: a result, or an error of Kiln's own that says what is wrong."""

import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / package) for package in ("inference", "guides", "ppl_models"))
KINDS = (ValueError, TypeError, NotImplementedError, OSError)
PHASES = [Phase.generate, Phase.shrink]


def outcome(call):
    """The result of ``call()`` and no words, or no result and the words of the error, which has to be Kiln's own."""
    try:
        return call(), None
    except Exception as error:
        caught = error
    words, raised = str(caught), traceback.extract_tb(caught.__traceback__)[-1].filename
    assert isinstance(caught, KINDS), f"{type(caught).__name__} is no error of Kiln's: {words}"
    assert isinstance(caught, OSError) or raised.startswith(OURS), f"raised in {raised}, not by Kiln: {words}"
    assert 0 < len(words) < 2000, f"{len(words)} letters are no message: {words[:200]}"
    return None, words


def hold(property_, strategy, examples):
    """Check ``property_`` on that many examples, the same ones every time."""
    settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(property_))()
