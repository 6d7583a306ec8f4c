"""The user's cache folders, of code that is run: nobody else may be able to write there."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

__all__ = ["cache_folder", "is_private", "keep_newest", "newest_first"]

_UNMAPPED = 65534  # what root is in a user's namespace


def cache_folder(name: str) -> Path | None:
    """``$XDG_CACHE_HOME/kiln/name`` (``~/.cache`` by default); None where others could change what is in it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "kiln" / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    private = is_private(folder) and all(map(_is_safe_above, folder.resolve().parents))
    return folder if private and os.access(folder, os.W_OK) else None


def _is_safe_above(path: Path) -> bool:
    """Whether nobody but the user and root can put something else in the place of what is below."""
    found = path.stat()
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != os.getgid())
    return found.st_uid in (0, os.getuid(), _UNMAPPED) and (not others or bool(found.st_mode & stat.S_ISVTX))


def is_private(path: Path) -> bool:
    """Whether ``path`` is there, no link, and only the user can write to it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if stat.S_ISLNK(found.st_mode) or not hasattr(os, "getuid"):
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all entries of ``folder``, which are folders, but the ``count`` that were written last."""
    for entry in newest_first(folder)[count:]:
        shutil.rmtree(entry, ignore_errors=True)


def newest_first(folder: Path) -> list[Path]:
    """What is in ``folder``, the last written first; another process may take an entry away meanwhile."""

    def age(path: Path) -> float:
        try:
            return -path.stat().st_mtime
        except OSError:
            return 0.0

    return sorted(folder.iterdir(), key=age)
