"""The end of a fit whose numbers are no longer finite, and texts of errors that are safe to show."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["NonFinite", "printable", "problem_of"]


class NonFinite(ValueError):
    """A loss or a gradient that is NaN or infinite, at a step of a fit.

    Attributes
    ----------
    step
        The steps that were good; the one after them, whose number from 0 this
        is, failed.
    site, parameter
        The site of model or guide, or the parameter, that is not finite; None
        where it is neither of one.
    posterior
        The posterior as it was after the last good step, once ``fit`` has raised this.
    """

    def __init__(self, message: str, step: int, *, site: str | None = None, parameter: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.site = site
        self.parameter = parameter
        self.posterior: Any = None


def problem_of(error: Exception) -> str:
    """Return the message of a model's error, without the trace shapes that Pyro adds."""
    return re.split(r"\s*Trace Shapes:", str(error))[0].strip() or type(error).__name__


def printable(text: object) -> str:
    r"""``str(text)`` with control characters, marks of direction and halves of characters as their escapes.

    >>> printable("\x1b[31mred")
    '\\x1b[31mred'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
