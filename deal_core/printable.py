"""Text from outside as people may see it: on one screen, with nothing in it that a terminal acts on."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection

MAX_LISTED = 20
"""Names in a message; of more, the rest is counted."""

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls but tab and line feed, marks that change the direction of text, line separators, lone surrogates."""


def printable(text: str) -> str:
    r"""The text with what a terminal would act on, or could not show, escaped; line ends and tabs stay.

    Example:
        >>> printable("\x1b[31mred")
        '\\x1b[31mred'
    """
    return _UNSAFE.sub(_escaped, text)


def printable_json(text: str) -> str:
    """The same of JSON: what it says stays the same."""
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
    """`repr`, at most about `width` characters long, whatever the value's size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = width
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of {type(value).__name__} that is too large to show"


def listed(names: Collection[str], *, most: int = MAX_LISTED, width: int = 40) -> str:
    """Names for a message: each cut where it is long, of many the first ones and the number of the others.

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
