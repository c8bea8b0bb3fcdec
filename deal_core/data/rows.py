"""Rows: raw as in a file, good as in a dataset, and bad as in quarantine."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import pyarrow as pa

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
BATCH_ROWS = 4096
BATCH_CHARS = 2**19
"""Most rows and characters of a batch. A single row (in Parquet a single piece) may be larger."""
Item = TypeVar("Item")


class Problem(NamedTuple):
    """One problem of a row, and the shortened value that shows it."""

    reason: Reason
    value: str


class RawRow(NamedTuple):
    """One row of a file, before any check."""

    number: int
    """Number of the row, from 1, without a CSV's header; in JSON lines the number of the line."""
    values: Mapping[str, Any]
    """The row's columns; empty if the row could not be read."""
    line: int | None = None
    """The line of the file on which the row begins; None if the file has no lines."""
    fault: Problem | None = None
    """Why the row could not be read."""
    whole: Callable[[], Any] | None = None
    """Returns the row for quarantine, if quarantine does not keep `values`."""

    def raw(self) -> Any:
        """The row for quarantine: its columns, or the text that could not be read."""
        return self.values if self.whole is None else self.whole()


class Row(NamedTuple):
    """A good row."""

    input: str
    output: str
    digest: bytes
    """SHA-256 of the normalised row, see `row_digest`."""
    input_digest: bytes
    """Digest of the normalised input: rows with one text are on one side of the split, even with different answers."""
    split: Split | None
    """The split that the file names; None if it names none."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """One row that cannot be used, and all its problems."""

    file: str
    row: int
    """As in `RawRow.number`."""
    line: int | None
    """As in `RawRow.line`."""
    problems: tuple[Problem, ...]

    def describe(self, include_texts: bool) -> str:
        """The row in a few words; its values are quoted only if texts may be shown."""
        line = f" (line {self.line})" if self.line not in (None, self.row) else ""
        found = (f"{reason}: {value!r}" if include_texts else reason for reason, value in self.problems)
        return f"row {self.row}{line} {', '.join(found)}"


_quote = json.JSONEncoder(ensure_ascii=False).encode


def quote_normal(part: str) -> str:
    """Normalise a part of a row for the digest: Unicode's form NFC, single spaces, quoted as JSON."""
    return _quote(" ".join(unicodedata.normalize("NFC", part).split()))


def row_digest(*parts: str) -> bytes:
    """SHA-256 of a row's inputs (a chat has several) and its output, or only of its inputs.

    Unicode's form (NFC) and the amount of white space do not change the digest.
    """
    normal = ", ".join(map(quote_normal, parts))
    return hashlib.sha256(f"[{normal}]".encode()).digest()


def stored_input_digest(kind: Format, stored: str) -> bytes:
    """`Row.input_digest` of an input as a dataset stores it."""
    if kind == "chat":
        return row_digest(*(part for message in json.loads(stored) for part in (message["role"], message["content"])))
    return row_digest(stored)


class RowBatch(Protocol):
    """Consecutive rows of a file."""

    num_rows: int

    def rows(self, places: Sequence[int]) -> list[RawRow]:
        """The rows at these places, counted from 0."""

    def column(self, name: str) -> pa.Array:
        """A column's cells as texts. Null for missing cells, other types than text or whole number, and not UTF-8."""


class RowList:
    """A batch made of single rows."""

    def __init__(self, rows: list[RawRow]) -> None:
        self._rows = rows
        self.num_rows = len(rows)

    def rows(self, places: Sequence[int]) -> list[RawRow]:
        """See `RowBatch.rows`."""
        return [self._rows[place] for place in places]

    def column(self, name: str) -> pa.Array:
        """See `RowBatch.column`."""
        return text_array([row.values.get(name) for row in self._rows])


def text_array(cells: list[Any]) -> pa.Array:
    """Texts, and whole numbers as texts; null for other types, and for a text with a lone surrogate (not UTF-8)."""
    cells = [cell if type(cell) is str else str(cell) if type(cell) is int else None for cell in cells]
    try:
        return pa.array(cells, pa.string())
    except UnicodeEncodeError:
        return pa.array([cell if cell is not None and is_utf8(cell) else None for cell in cells], pa.string())


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8. Bytes that were not UTF-8 are lone surrogates, which cannot."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def grouped(items: Iterable[tuple[Item, int]], max_items: int) -> Iterator[list[Item]]:
    """Group items by their sizes into lists of at most BATCH_CHARS; a larger item gets its own list.

    If reading an item fails, the earlier items are yielded before the error is raised.
    """
    group: list[Item] = []
    total = 0
    try:
        for item, size in items:
            if group and (len(group) == max_items or total + size > BATCH_CHARS):
                yield group
                group, total = [], 0
            group.append(item)
            total += size
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group
