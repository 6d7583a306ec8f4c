"""The user's cache folders, of code that is run: nobody else may be able to write there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["cache_folder", "is_private"]


def cache_folder(name: str) -> Path | None:
    """``$XDG_CACHE_HOME/kiln/name`` (``~/.cache`` by default); None where only the user is not who can write there."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "kiln" / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if is_private(folder) and os.access(folder, os.W_OK) else None


def is_private(path: Path) -> bool:
    """Whether ``path`` is there, no link, and only the user can write to it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if stat.S_ISLNK(found.st_mode) or not hasattr(os, "getuid"):
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
