"""JSON that is replaced whole and read with suspicion: regular file, bounded size, strict grammar, schema, checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

__all__ = ["ADVICE", "MOST_BYTES", "read_bytes", "read_json", "replacing", "sync", "write_json"]

SCHEMA, SEAL = "schema", "sha256"
MOST_BYTES = 2**24  # of JSON
_DIGITS = 40  # of an integer: the 128 bits of a generator's state
ADVICE = "take it from a backup, or make it again"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once it is on the disk whole; if anything fails, ``path`` stays.

    Raises
    ------
    OSError
        If it cannot be written, with the folder, the reason and what to do.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(
            f"{path.parent} cannot be written ({error.strerror or error}): make room, or give a folder that can; "
            f"if it had a {path.name} before, that is still there"
        ) from error


def sync(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no such thing
            raise
    finally:
        os.close(handle)


def read_bytes(path: Path, most: int, size: int | None = None) -> bytes:
    """The content of a regular file, no link, of at most ``most`` bytes, of exactly ``size`` where that is known.

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
            _refuse_size(path, status.st_size, most, size)
            return _whole(path, file, status.st_size)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path} is not there") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror or error}): see to its permissions") from error


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(f"{path} is a link, which is not followed: put the file itself there")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file: {ADVICE}")


def _refuse_size(path: Path, found: int, most: int, size: int | None) -> None:
    if size is not None and found != size:
        raise ValueError(f"{path} is damaged: it has {found:,} bytes, not the {size:,} that were written; {ADVICE}")
    if found > most:
        raise ValueError(f"{path} has {found:,} bytes, and at most {most:,} are read: {ADVICE}")


def _whole(path: Path, file: BinaryIO, size: int) -> bytes:
    """Read once, so that what is checked is what is used."""
    try:
        content = file.read(size)
    except MemoryError as error:
        raise ValueError(f"{path} has {size:,} bytes, which do not fit in memory: use a machine with more") from error
    if len(content) < size or file.read(1):
        raise ValueError(f"{path} changed while it was read: try again when nothing writes to it")
    return content


def write_json(path: Path, content: Mapping[str, Any], schema: int) -> None:
    """Write ``content`` with its schema and a checksum, whole or not at all.

    Raises
    ------
    ValueError
        If it has a number that is not finite, or a key of the envelope.
    TypeError
        If it has what JSON does not know.
    OSError
        If it cannot be written.
    """
    if taken := sorted({SCHEMA, SEAL} & content.keys()):
        raise ValueError(f"{path}: {taken} are the envelope's: give the content other names")
    try:
        plain = json.loads(json.dumps({SCHEMA: schema, **content}, allow_nan=False))
    except ValueError as error:
        raise ValueError(f"{path} cannot hold a number that is not finite ({error}): keep None or a text") from error
    text = json.dumps({**plain, SEAL: _digest(plain)}, indent=2, allow_nan=False) + "\n"
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path} would have {len(text):,} bytes, and at most {MOST_BYTES:,} are read: keep less")
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path: Path, schema: int, required: Collection[str] = ()) -> dict[str, Any]:
    """What :func:`write_json` was given.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ValueError
        If it is damaged, of another schema, or lacks a key that is ``required``.
    OSError
        If it cannot be read.
    """
    raw = read_bytes(path, MOST_BYTES)
    try:
        content = json.loads(
            raw.decode(),
            parse_float=_finite,
            parse_int=_bounded,
            parse_constant=_no_number,
            object_pairs_hook=_without_repeats,
        )
        found = content.pop(SEAL, None) if isinstance(content, dict) else None
        digest = _digest(content)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is damaged ({reason}): {ADVICE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it is a {type(content).__name__}, no object): {ADVICE}")
    number = content.pop(SCHEMA, None)
    if type(number) is not int or number != schema:
        raise ValueError(
            f"{path} has schema {number!r:.40}, and this version of kiln-ppl reads {schema}: "
            "use the version that wrote it, or make it again"
        )
    if found != digest:
        raise ValueError(f"{path} is damaged (its checksum does not fit its content): {ADVICE}")
    if missing := sorted(set(required) - content.keys()):
        raise ValueError(f"{path} lacks {missing}: it was written by something else; {ADVICE}")
    return content


def _digest(content: Any) -> str:
    """SHA-256 of the values, however the text is laid out."""
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_DIGITS]} is no finite number")
    return value


def _bounded(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"an integer of {len(text):,} digits")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has the same key twice")
    return content
