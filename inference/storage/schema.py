"""What a value read from a file must be: checked before it is used, with an error that names the file and the place."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.storage.atomic_files import ADVICE
from inference.utils.errors import printable

__all__ = [
    "ANY",
    "FLAG",
    "NUMBER",
    "SEED",
    "SHAPE",
    "TEXT",
    "WHOLE",
    "Schema",
    "check",
    "either",
    "list_of",
    "mapping_of",
    "record",
]

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
            complaint = option(value) if callable(option) else _same(value, option)
            if complaint is None:
                return None
            complaints.append(complaint)
        deepest = max(complaints, key=lambda complaint: len(complaint[0]))
        return deepest if deepest[0] else ("", " or ".join(wanted for _, wanted in complaints))

    return kind


def _same(value: Any, wanted: Any) -> Complaint:
    return None if type(value) is type(wanted) and value == wanted else ("", repr(wanted))


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
