"""JSON that is replaced whole and read with suspicion: bounded size, strict grammar, schema, checksum."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from inference.storage.atomic_files import ADVICE, read_bytes, replacing

__all__ = ["MOST_BYTES", "digest", "parsed", "read_json", "refuse_damage", "write_json"]

SCHEMA, SEAL = "schema", "sha256"
MOST_BYTES = 2**22  # of JSON
_DEPTH = 200  # of nesting
_DIGITS = 40  # of an integer: the 128 bits of a generator's state


def write_json(path: Path, content: Mapping[str, Any], schema: int) -> None:
    """Write ``content`` with its schema and a checksum, whole or not at all.

    Raises
    ------
    ValueError
        If it has what :func:`read_json` refuses, such as a number that is not finite, or a key of the envelope.
    TypeError
        If it has what JSON does not know.
    OSError
        If it cannot be written.
    """
    if taken := sorted({SCHEMA, SEAL} & content.keys()):
        raise ValueError(f"{path}: {taken} are the envelope's: give the content other names")
    try:
        plain = parsed(path, json.dumps({SCHEMA: schema, **content}, allow_nan=False).encode())
    except ValueError as error:
        raise ValueError(f"{path} could not be read again ({error}): keep None or a text instead") from error
    text = json.dumps({**plain, SEAL: digest(plain)}, indent=2, allow_nan=False) + "\n"
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path} would have {len(text):,} bytes, and at most {MOST_BYTES:,} are read: keep less")
    with replacing(path) as partial:
        partial.write_bytes(text.encode())


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
    content = parsed(path, read_bytes(path, MOST_BYTES))
    found = content.pop(SEAL, None)
    wanted = digest(content)
    number = content.pop(SCHEMA, None)
    if type(number) is not int or number != schema:
        raise ValueError(
            f"{path} has schema {number!r:.40}, and this version of kiln-ppl reads {schema}: "
            "use the version that wrote it, or make it again"
        )
    refuse_damage(path, wanted, found)
    if missing := sorted(set(required) - content.keys()):
        raise ValueError(f"{path} lacks {missing}: it was written by something else; {ADVICE}")
    return content


def parsed(path: Path, raw: bytes) -> dict[str, Any]:
    """The object in JSON that ``path`` holds, without what other readers of JSON let through.

    Raises
    ------
    ValueError
        If it is none, or has a key twice, a number that is not finite or very
        long, or very deep nesting.
    """
    try:
        content = json.loads(
            raw.decode(),
            parse_float=_finite,
            parse_int=_bounded,
            parse_constant=_no_number,
            object_pairs_hook=_without_repeats,
        )
        _refuse_depth(content)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is damaged ({reason}): {ADVICE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it is a {type(content).__name__}, no object): {ADVICE}")
    return content


def refuse_damage(path: Path, found: str, written: Any) -> None:
    """Raise a ValueError where a checksum is not the one that was written."""
    if found != written:
        raise ValueError(f"{path} is damaged (its checksum does not fit its content): {ADVICE}")


def digest(content: Any) -> str:
    """SHA-256 of the values, however the text is laid out."""
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def _refuse_depth(content: Any) -> None:
    layer, depth = [content], 0
    while layer:
        layer = [p for v in layer if isinstance(v, dict | list) for p in (v.values() if isinstance(v, dict) else v)]
        depth += 1
        if depth > _DEPTH:
            raise RecursionError


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
