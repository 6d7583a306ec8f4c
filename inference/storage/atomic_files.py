"""Files and folders on a disk that is not trusted.

Files are replaced whole, and read only if they are regular and of the expected
size. Cache folders hold code that is run, so nobody but the user may be able to
write to them or to replace them.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

__all__ = [
    "ADVICE",
    "cache_folder",
    "is_private",
    "keep_newest",
    "make_folder",
    "newest_first",
    "read_bytes",
    "replacing",
]

ADVICE = "take it from a backup, or make it again"


def make_folder(folder: Path) -> None:
    """Make ``folder`` if it does not exist.

    Raises
    ------
    OSError
        If nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}): give a folder that can") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; the file replaces ``path`` once all of it is on the disk.

    If anything fails, or the process ends, ``path`` stays what it was.

    Raises
    ------
    OSError
        If it cannot be written, with the folder, the reason and what to do.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        _remove(partial)
        try:
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        except BaseException:
            with suppress(OSError):
                _remove(partial)
            raise
    except OSError as error:
        raise OSError(
            f"{path.parent} cannot be written ({error.strerror or error}): make room there, or give another folder; "
            "what it holds is whole"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no fsync
            raise
    finally:
        os.close(handle)


def read_bytes(path: Path, most: int, size: int | None = None) -> bytes:
    """Return the content of a regular file, not a link, of at most ``most`` bytes and exactly ``size`` if passed.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ValueError
        If it is something else, or of another size; nothing is read then.
    OSError
        If it cannot be read.
    """
    try:
        _refuse_irregular(path, os.lstat(path))
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            _refuse_irregular(path, status)
            found = status.st_size
            if size is not None and found != size:
                raise ValueError(
                    f"{path} is damaged: it has {found:,} bytes, not the {size:,} that were written; {ADVICE}"
                )
            if found > most:
                raise ValueError(f"{path} has {found:,} bytes, and at most {most:,} are read: {ADVICE}")
            return _whole(path, file, found)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path} is not there") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror or error}): see to its permissions") from error


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(f"{path} is a link, which is not followed: put the file itself there")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file: {ADVICE}")


def _whole(path: Path, file: io.BufferedReader, size: int) -> bytes:
    """Read the file once, so that the bytes that are checked are the bytes that are used."""
    try:
        content = file.read(size)
    except MemoryError as error:
        raise ValueError(f"{path} has {size:,} bytes, which do not fit in memory: use a machine with more") from error
    if len(content) < size or file.read(1):
        raise ValueError(f"{path} changed while it was read: try again when nothing writes to it")
    return content


_UNMAPPED = 65534  # what root is in a user's namespace


def cache_folder(name: str) -> Path | None:
    """Return ``$XDG_CACHE_HOME/kiln/name`` (``~/.cache`` by default); None if others could change its content."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "kiln" / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    if not is_private(folder) or not os.access(folder, os.W_OK):
        return None
    for above in folder.resolve().parents:  # nobody but the user and root may put something else in its place
        found = above.stat()
        others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != os.getgid())
        if found.st_uid not in (0, os.getuid(), _UNMAPPED) or (others and not found.st_mode & stat.S_ISVTX):
            return None
    return folder


def is_private(path: Path) -> bool:
    """Return True if ``path`` exists, is not a link, and can be written by the user alone."""
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
    """Return the entries of ``folder``, the last written first; another process may remove one meanwhile."""

    def age(path: Path) -> float:
        try:
            return -path.stat().st_mtime
        except OSError:
            return 0.0

    return sorted(folder.iterdir(), key=age)
