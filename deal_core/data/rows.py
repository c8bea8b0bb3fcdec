"""What a row is: as it stands in a file, as a dataset keeps it, and as quarantine does."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deal_core.data.schema import Format, Split
from deal_core.printable import shorten as shorten

Reason = Literal[
    "malformed line",
    "missing column",
    "bad encoding",
    "empty text",
    "over-long text",
    "empty label",
    "label outside the task's set",
    "malformed messages",
    "unknown split",
    "duplicate row",
    "text of a test row",
]


class Problem(NamedTuple):
    """One thing wrong with one row, and the value that shows it, shortened."""

    reason: Reason
    value: str


class RawRow(NamedTuple):
    """One row as it stands in the file."""

    number: int
    """Counted from 1, a CSV's header not counted. In JSON lines the number of the line."""
    values: Mapping[str, Any]
    """The row's columns; empty when it could not be read."""
    line: int | None = None
    """The line of the file on which the row begins, where the file has lines."""
    fault: Problem | None = None
    """Why it could not be read."""
    whole: Callable[[], Any] | None = None
    """Gives the row as quarantine keeps it, where that is not `values`."""

    def raw(self) -> Any:
        """The row as quarantine keeps it: its columns, or the text that could not be read."""
        return self.values if self.whole is None else self.whole()


class Row(NamedTuple):
    """A good row."""

    input: str
    output: str
    digest: bytes
    """SHA-256 of the normalised row, see `row_digest`."""
    input_digest: bytes
    """The same of its input alone: rows that share a text lie on one side of the split, whatever their answers."""
    split: Split | None
    """What the file says; None when it does not."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """One row that cannot be used, and all that is wrong with it."""

    file: str
    row: int
    """As in `RawRow.number`."""
    line: int | None
    """As in `RawRow.line`."""
    problems: tuple[Problem, ...]

    def describe(self, include_texts: bool) -> str:
        """The row in a few words; what it holds only if texts may be shown."""
        line = f" (line {self.line})" if self.line not in (None, self.row) else ""
        found = (f"{reason}: {value!r}" if include_texts else reason for reason, value in self.problems)
        return f"row {self.row}{line} {', '.join(found)}"


_quote = json.JSONEncoder(ensure_ascii=False).encode


def quote_normal(part: str) -> str:
    """A part of a row as its digest sees it: in Unicode's form NFC, white space made single spaces, quoted as JSON."""
    return _quote(" ".join(unicodedata.normalize("NFC", part).split()))


def row_digest(*parts: str) -> bytes:
    """SHA-256 of a row's inputs (a chat has several) and its output, or of its inputs alone.

    It is blind to Unicode's form (NFC) and to the amount of white space.
    """
    normal = ", ".join(map(quote_normal, parts))
    return hashlib.sha256(f"[{normal}]".encode()).digest()


def stored_input_digest(kind: Format, stored: str) -> bytes:
    """`Row.input_digest` of an input as a dataset stores it."""
    if kind == "chat":
        return row_digest(*(part for message in json.loads(stored) for part in (message["role"], message["content"])))
    return row_digest(stored)
