"""Rows: raw as in a file, good as in a dataset, and bad as in quarantine; and sets of their digests."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deal_core.data.schema import Format, Split

Reason = Literal[
    "malformed line", "missing column", "bad encoding", "empty text", "over-long text", "empty label",
    "label outside the task's set", "malformed messages", "unknown split", "duplicate row", "text of a test row",
    "equal answers",
]  # fmt: skip
BATCH_ROWS = 4096
BATCH_CHARS = 2**19
"""Most rows and characters of a batch. A single row (in Parquet a single piece) may be larger."""
Item = TypeVar("Item")
Digests = npt.NDArray[np.void]
"""Array of digests of 32 bytes each."""
_CHUNK = 2**16


class Problem(NamedTuple):
    """One problem of a row, and the shortened value that shows it."""

    reason: Reason
    value: str
    why: str = ""
    """What is wrong, without a word of the row. It may be shown where texts may not; empty if `reason` says it all."""


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
    references: tuple[str, ...] = ()
    """All right answers, `output` first, if there are several."""
    rejected: str | None = None
    """The worse answer, if the row is a preference."""


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
        shown = [(reason, repr(value) if include_texts else why) for reason, value, why in self.problems]
        return f"row {self.row}{line} {', '.join(f'{reason}: {each}' if each else reason for reason, each in shown)}"


def normal_line_ends(text: str) -> str:
    """The text with Unix line ends."""
    return text.replace("\r\n", "\n")


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
        return row_digest(*(part for message in json.loads(stored) for part in message_parts(message)))
    return row_digest(stored)


def message_parts(message: Mapping[str, Any]) -> list[str]:
    """A chat's message as parts of a digest: role, content, and one part for its tools and tool calls, if any."""
    parts = [message["role"], message["content"]]
    if len(message) > len(parts):
        more = {name: value for name, value in message.items() if name not in ("role", "content")}
        parts.append(json.dumps(more, ensure_ascii=False, sort_keys=True))
    return parts


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


class DigestSet:
    """A set of SHA-256 digests in about 50 bytes each; a Python set takes 130.

    It is an array in order of arrival, and a hash table of places in the array with open addressing.
    """

    def __init__(self) -> None:
        self._words = np.zeros((256, 4), np.uint64)
        self._table = np.zeros(1024, np.uint32)  # place + 1 in `_words`; 0: free
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def contains(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Which of the digests are in the set."""
        words = _words_of(digests)
        found = np.zeros(len(words), np.bool_)
        slots, open_ = self._slots(words), np.arange(len(words))
        while len(open_):
            places = self._table[slots[open_]]
            open_, places = open_[places > 0], places[places > 0]
            same = (self._words[places - 1] == words[open_]).all(axis=1)
            found[open_[same]] = True
            open_ = open_[~same]
            slots[open_] = self._next(slots[open_])
        return found

    def add(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Add the digests; return which are new, that is neither in the set nor earlier in `digests`."""
        words = _words_of(digests)
        start, end = self._size, self._size + len(words)
        self._reserve(end)
        self._words[start:end] = words
        is_new, slots = self._claim(start, end)
        self._size = start + int(is_new.sum())
        self._words[start : self._size] = words[is_new]
        self._table[slots[is_new]] = np.arange(start, self._size, dtype=np.uint32) + 1
        return is_new

    def in_order(self) -> memoryview:
        """The sorted digests, one after another. No digest can be added afterwards."""
        self._table = np.zeros(0, np.uint32)
        digests = self._words[: self._size].view("S32")  # all have 32 bytes, so NULs at the end do no harm
        digests.sort(axis=0)
        return digests.view(np.uint8).data

    def _claim(self, start: int, end: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Enter places of `_words` into the table if their digest is new; return which are new, and the slots."""
        words = self._words[start:end]
        is_new = np.zeros(len(words), np.bool_)
        slots, open_ = self._slots(words), np.arange(len(words))
        while len(open_):
            free = open_[self._table[slots[open_]] == 0]
            self._table[slots[free[::-1]]] = start + free[::-1] + 1  # of equal slots the last write wins: the first row
            places = self._table[slots[open_]].astype(np.int64) - 1
            own = places == start + open_
            is_new[open_[own]] = True
            open_, places = open_[~own], places[~own]
            open_ = open_[(self._words[places] != words[open_]).any(axis=1)]
            slots[open_] = self._next(slots[open_])
        return is_new, slots

    def _reserve(self, size: int) -> None:
        if size > len(self._words):
            self._words.resize((size + size // 8, 4), refcheck=False)
        if size > len(self._table) // 2:
            self._table = np.zeros(1 << int(3 * size).bit_length(), np.uint32)
            for start in range(0, self._size, _CHUNK):
                self._claim(start, min(start + _CHUNK, self._size))

    def _slots(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return words[:, 1] & np.uint64(len(self._table) - 1)  # not the first word, which decides the split

    def _next(self, slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return (slots + np.uint64(1)) & np.uint64(len(self._table) - 1)


def merge_digests(*ordered: memoryview) -> Iterator[bytes]:
    """Merge sorted digests of several sets into one order. The result comes in pieces, to save memory."""
    bounds = np.arange(1, 256, dtype=np.uint8).view("S1").astype("S32")
    sets = [np.frombuffer(each, "S32") for each in ordered]
    for pieces in zip(*(np.split(each, np.searchsorted(each, bounds)) for each in sets), strict=True):
        yield np.sort(np.concatenate(pieces), kind="stable").tobytes()


def as_digests(digests: bytes) -> Digests:
    """An array of concatenated digests."""
    return np.frombuffer(digests, "V32")


def first_words(digests: Digests) -> npt.NDArray[np.uint32]:
    """The first four bytes of each digest, as a number."""
    return np.ascontiguousarray(digests).view(">u4")[::8]


def hex_array(digests: Digests) -> pa.Array:
    """The digests as texts of 64 characters."""
    offsets = np.arange(len(digests) + 1, dtype=np.int32) * 64
    return pa.Array.from_buffers(
        pa.string(), len(digests), [None, pa.py_buffer(offsets), pa.py_buffer(digests.tobytes().hex().encode())]
    )


def _words_of(digests: Digests) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 4)
