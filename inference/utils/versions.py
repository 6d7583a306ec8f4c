"""Versions of the packages that a result depends on."""

from __future__ import annotations

from functools import cache
from importlib import metadata

__all__ = ["versions"]


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: metadata.version(name) for name in ("kiln-ppl", "pyro-ppl", "torch", "numpy", "arviz")}
