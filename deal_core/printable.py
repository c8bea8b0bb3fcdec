"""Text from outside, made safe to show: short, and without characters that control a terminal."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection

MAX_LISTED = 20
"""Most names in a message; further names are only counted."""

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, text direction marks, line separators, lone surrogates."""


def printable(text: str) -> str:
    r"""Escape characters that control a terminal or cannot be shown; line ends and tabs stay.

    Example:
        >>> printable("\x1b[31mred")
        '\\x1b[31mred'
    """
    return _UNSAFE.sub(_escaped, text)


def printable_json(text: str) -> str:
    """`printable` for JSON text, with JSON's own escapes, so the parsed value stays the same."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shorten(value: object, width: int = 80) -> str:
    """The value on one line, at most `width` characters long, with unprintable characters escaped."""
    if not isinstance(value, str):
        value = brief(value, width)
    line = value[: width + 1]
    if not line.isprintable():
        cut = line.encode("utf-8", "backslashreplace").decode("utf-8")
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return line if len(line) <= width else line[: width - 1] + "…"


def brief(value: object, width: int = 80) -> str:
    """`repr`, cut to about `width` characters for values of any size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = width
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of {type(value).__name__} that is too large to show"


def listed(names: Collection[str], *, most: int = MAX_LISTED, width: int = 40) -> str:
    """Join names for a message: long names are cut, and names beyond the first `most` are counted.

    Example:
        >>> listed(["late", "lost", "broken"], most=2)
        'late, lost and 1 more'
    """
    first = [shorten(name, width) for _, name in zip(range(most), names, strict=False)]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
