"""Sections of a report, the names that it uses, and the HTML page of one file that is made of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from inference.diagnostics.verdict import Explained
from inference.storage.atomic_files import replacing
from inference.storage.json_document import versions

__all__ = ["Labels", "Section", "provenance", "write_page"]


@dataclass(frozen=True)
class Labels:
    """Names that a report uses: of the data set, the input columns and the target, and its title."""

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


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Write ``template`` of the package, filled with ``content``, to ``path``: whole or not at all."""
    loader = jinja2.PackageLoader("inference.reporting", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["inline"] = lambda svg: f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    page = environment.get_template(template).render(**content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def provenance(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Versions, ``facts`` and the time, as a page ends with them."""
    return [*versions().items(), *facts, ("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))]
