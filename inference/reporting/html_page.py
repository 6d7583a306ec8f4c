"""An HTML page that is one file: templates with every name escaped, figures inside."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from inference.storage.atomic_files import replacing
from inference.utils.versions import versions

__all__ = ["provenance", "write_page"]


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Write ``template`` of the package, filled with ``content``, to ``path``: whole or not at all."""
    loader = jinja2.PackageLoader("inference.reporting", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["inline"] = _inline
    page = environment.get_template(template).render(**content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def provenance(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Versions, ``facts`` and the time, as a page ends with them."""
    return [*versions().items(), *facts, ("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))]


def _inline(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
