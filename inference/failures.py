"""The end of a fit whose numbers are no longer finite."""

from __future__ import annotations

from typing import Any

__all__ = ["NonFinite"]


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
