"""What a report is made of: sections, and the names that it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from inference.diagnostics.verdict import Explained

__all__ = ["Labels", "Section"]


@dataclass(frozen=True)
class Labels:
    """How the report names things: the data set, the input columns, the target, and the title."""

    title: str | None = None
    data: str | None = None
    columns: Sequence[str] = ()
    target: str | None = None


@dataclass(frozen=True)
class Section:
    """A question with the sentence that says how to read its answer: a figure, a table, checks, or several of them.

    ``level`` is 2, or 3 for a part of the section before it.
    """

    title: str
    reading: str
    figure: str | None = None
    rows: Sequence[Sequence[str]] = ()
    head: Sequence[str] = ()
    figure_label: str = field(default="")
    checks: Sequence[Explained] = ()
    level: int = 2
