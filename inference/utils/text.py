"""Text from files as it can be shown: what would steer a terminal, or break a figure, is spelt out."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: object) -> str:
    r"""``str(text)`` with control characters, marks of direction and halves of characters as their escapes.

    >>> printable("\x1b[31mred")
    '\\x1b[31mred'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
