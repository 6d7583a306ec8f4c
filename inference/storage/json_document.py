"""JSON documents on disk: replaced whole, and checked when they are read.

A document is bounded in size, strict in grammar, and holds its schema number
and a checksum. A checksum finds accidents, and says nothing about who wrote the
file: so each field is also checked against a :data:`Schema` before it is used,
with an error that names the file and the place.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from inference.storage.atomic_files import ADVICE, read_bytes, replacing
from inference.utils.errors import printable

__all__ = [
    "ANY",
    "FLAG",
    "MOST_BYTES",
    "NUMBER",
    "SEED",
    "SHAPE",
    "TEXT",
    "WHOLE",
    "Schema",
    "check",
    "digest",
    "either",
    "list_of",
    "mapping_of",
    "parsed",
    "read_json",
    "record",
    "refuse_damage",
    "versions",
    "write_json",
]

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
    """Return the content that :func:`write_json` was given.

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
    """Return the JSON object that ``path`` holds, parsed more strictly than by :mod:`json` alone.

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
    """Raise a ValueError if a checksum is not the one that was written."""
    if found != written:
        raise ValueError(f"{path} is damaged (its checksum does not fit its content): {ADVICE}")


def digest(content: Any) -> str:
    """Return the SHA-256 of the values, which does not depend on the layout of the text."""
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


Complaint = tuple[str, str] | None  # the place within the value, and what belongs there
Schema = Callable[[Any], Complaint]
_DIMENSIONS = 64


def check(path: Path, content: Any, kind: Schema) -> None:
    """Raise a ValueError that names ``path`` and the first place in ``content`` that is not of ``kind``."""
    complaint = kind(content)
    if complaint is not None:
        place, wanted = complaint
        where = f" at {place.removeprefix('.')}" if place else ""
        raise ValueError(f"{path} does not have {wanted}{where}: it was written by something else; {ADVICE}")


def _plain(wanted: str, fits: Callable[[Any], bool]) -> Schema:
    return lambda value: None if fits(value) else ("", wanted)


ANY = _plain("anything", lambda value: True)
FLAG = _plain("true or false", lambda value: isinstance(value, bool))
TEXT = _plain("text", lambda value: isinstance(value, str))
WHOLE = _plain("a whole number from 0", lambda value: type(value) is int and 0 <= value < 2**63)
SEED = _plain("a whole number from 0 to 2³² − 1", lambda value: type(value) is int and 0 <= value < 2**32)
NUMBER = _plain("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))


def either(*allowed: Any) -> Schema:
    """One of these: kinds, or the values themselves."""

    def kind(value: Any) -> Complaint:
        complaints = []
        for option in allowed:
            if callable(option):
                complaint = option(value)
            else:
                same = type(value) is type(option) and value == option
                complaint = None if same else ("", repr(option))
            if complaint is None:
                return None
            complaints.append(complaint)
        deepest = max(complaints, key=lambda complaint: len(complaint[0]))
        return deepest if deepest[0] else ("", " or ".join(wanted for _, wanted in complaints))

    return kind


def list_of(part: Schema) -> Schema:
    """A list of any length."""

    def kind(value: Any) -> Complaint:
        if not isinstance(value, list):
            return "", "a list"
        return _first((f"[{i}]", part(item)) for i, item in enumerate(value))

    return kind


def mapping_of(part: Schema, **named: Schema) -> Schema:
    """An object with values of one kind under any names, and of others under these, where they are there."""

    def kind(value: Any) -> Complaint:
        if not isinstance(value, dict):
            return "", "an object"
        return _first((f".{printable(name)[:40]}", named.get(name, part)(item)) for name, item in value.items())

    return kind


def record(**parts: Schema) -> Schema:
    """An object with exactly these names."""

    def kind(value: Any) -> Complaint:
        if not isinstance(value, dict):
            return "", "an object"
        if value.keys() != parts.keys():
            return "", f"an object of {', '.join(sorted(parts))}"
        return _first((f".{name}", part(value[name])) for name, part in parts.items())

    return kind


def _shape(value: Any) -> Complaint:
    if not isinstance(value, list) or len(value) > _DIMENSIONS:
        return "", f"a list of at most {_DIMENSIONS} sizes"
    return list_of(WHOLE)(value)


SHAPE: Schema = _shape


def _first(found: Any) -> Complaint:
    for place, complaint in found:
        if complaint is not None:
            return place + complaint[0], complaint[1]
    return None


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, which files of results say."""
    return {name: metadata.version(name) for name in ("kiln-ppl", "pyro-ppl", "torch", "numpy", "arviz")}
