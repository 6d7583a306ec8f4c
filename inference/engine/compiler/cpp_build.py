"""The C++ compiler: one program, and the headers of all programs, which are compiled once.

A compiler spends most of its time for a program on reading Inductor's headers.

A compiled header is loaded by the compiler without a check of its content, so it
is used only if nobody but the user can have written it, and if it has the
checksum that was written beside it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from inference.engine.compiler import inductor
from inference.storage.atomic_files import cache_folder, is_private, keep_newest

__all__ = ["build", "precompiled"]

_KEPT = 2  # of some 150 MB
_NAME, _DIGEST = "prefix.h", "sha256"
_TEXT = f"#include <{inductor.PREFIX}>\n"


@contextmanager
def precompiled() -> Iterator[Callable[[], Path | None]]:
    """Give a function that returns the header to include first; a missing header is compiled while the body runs.

    The body is meant to be Inductor's work on the graph, which is Python, so that
    the two share the time. The function waits for the header. It returns None if
    there is no header to be had: a program then reads all of the text by itself,
    and is the same. Headers are kept in ``$XDG_CACHE_HOME/kiln/headers``, under a
    hash of the compiler, its options, torch and the processor.

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
        command = inductor.compiler_command(header, header.name, Path(folder), precompiling=True)
        with ThreadPoolExecutor(1) as pool:
            yield pool.submit(_compiled, header, command, Path(folder)).result


def _place() -> Path | None:
    """Return the path of the header, made or not; None if there is no folder to keep it in."""
    command = inductor.compiler_command(Path(_NAME), _NAME, Path(), precompiling=True)
    cache = cache_folder("headers")
    if cache is None:
        return None
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False)  # noqa: S603
        parts = [inductor.machine(), version.stdout, *command, _TEXT]
        entry = cache / hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:40]
        entry.mkdir(mode=0o700, exist_ok=True)
        os.utime(entry)
        keep_newest(cache, _KEPT)
    except OSError:
        return None
    return entry / _NAME if is_private(entry) else None


def _is_whole(header: Path) -> bool:
    """Return True if text, checksum and compiled header are the user's own and fit each other."""
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
    """Run ``command``, which writes into ``folder``, and put the result beside the header: compilers look there.

    The checksum is put there first and the compiled header last, so that a process which dies in between leaves
    nothing that looks whole.
    """
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
    """Write a file whole or not at all: another process may be writing the same one."""
    partial = folder / path.name
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.replace(path)


def build(source: Path, library: Path, header: Path | None = None) -> None:
    """Compile a C++ file that holds Inductor's kernels, with a ``header`` that :func:`precompiled` gave, if any.

    Raises
    ------
    NotCompilable
        If there is no C++ compiler, or it fails.
    """
    try:
        failure = _compile(source, library, header)
        if failure is not None and header is not None:  # not one that this compiler can use
            failure = _compile(source, library)
        if failure is not None:  # a compiler older than the processor: ask it what it knows
            failure = _compile(source, library, check_instructions=True)
    except OSError as error:
        raise inductor.no_compiler(error) from error
    if failure is not None:
        raise inductor.NotCompilable(f"the C++ compiler failed: {failure}")


def _compile(source: Path, library: Path, header: Path | None = None, check_instructions: bool = False) -> str | None:
    """Compile a file; return the first error, None if there is none."""
    command = inductor.compiler_command(source, library.stem, library.parent, check_instructions)
    command += ["-o", str(library)]
    if header is not None:
        command[1:1] = ["-include", str(header)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - torch's own command
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return (errors or done.stderr.splitlines() or ["no message"])[0]
