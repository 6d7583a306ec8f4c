"""The C++ headers of every program, compiled once: reading them is most of what a compiler does for a program."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from inference.engine.compiler import inductor
from inference.storage.cache_folder import cache_folder, is_private, newest_first

__all__ = ["precompiled"]

_KEPT = 2  # of some 150 MB
_NAME, _DIGEST = "prefix.h", "sha256"
_TEXT = f"#include <{inductor.PREFIX}>\n"


@contextmanager
def precompiled() -> Iterator[Callable[[], Path | None]]:
    """A function for the header to include first; where that has to be compiled yet, it is while the body runs.

    The function waits, and returns None where there is no such header: a
    program then reads all of it by itself, and is the same. It is kept in
    ``$XDG_CACHE_HOME/kiln/headers``, under a hash of the compiler, its options,
    torch and the processor, and used where only the user can have written it
    and it is whole.

    Raises
    ------
    NotCompilable
        If there is no C++ compiler.
    """
    header = _place()
    if header is None or _is_whole(header):
        yield lambda: header
        return
    with tempfile.TemporaryDirectory(dir=header.parent, ignore_cleanup_errors=True) as folder:
        command = inductor.header_command(header, Path(folder))
        with ThreadPoolExecutor(1) as pool:
            yield pool.submit(_compiled, header, command, Path(folder)).result


def _place() -> Path | None:
    """Where the header is, or is to be; None where it cannot be kept."""
    command = inductor.header_command(Path(_NAME), Path())
    cache = cache_folder("headers")
    if cache is None:
        return None
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False)  # noqa: S603
        parts = [inductor.machine(), version.stdout, *command, _TEXT]
        entry = cache / hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:40]
        entry.mkdir(mode=0o700, exist_ok=True)
        os.utime(entry)
        _prune(cache)
    except OSError:
        return None
    return entry / _NAME if is_private(entry) else None


def _is_whole(header: Path) -> bool:
    files = [header, header.with_name(_DIGEST), *header.parent.glob(f"{_NAME}.*")]
    if len(files) != 3 or not all(is_private(path) for path in files):
        return False
    try:
        return header.read_text() == _TEXT and files[1].read_text() == _digest(files[2])
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compiled(header: Path, command: Sequence[str], folder: Path) -> Path | None:
    """Run ``command``, which writes into ``folder``, and put the result beside the header: compilers look there."""
    try:
        if not (is_private(header) and header.read_text() == _TEXT):
            _write(header, _TEXT, folder)
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - torch's own command
        if done.returncode:
            return None
        (made,) = folder.iterdir()
        made.chmod(0o600)
        _write(header.with_name(_DIGEST), _digest(made), folder)
        made.replace(header.parent / made.name)
    except (OSError, ValueError):
        return None
    return header


def _write(path: Path, text: str, folder: Path) -> None:
    """Whole or not at all: another process may be writing the same."""
    partial = folder / path.name
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.replace(path)


def _prune(cache: Path) -> None:
    for entry in newest_first(cache)[_KEPT:]:
        shutil.rmtree(entry, ignore_errors=True)
