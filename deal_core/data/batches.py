"""Rows of a file some at a time: one by one, and a column at a time where their cells are plain texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from deal_core.data.rows import RawRow

BATCH_ROWS = 4096
BATCH_CHARS = 2**19
"""A batch ends with the row that reaches either."""


class RowBatch(Protocol):
    """Consecutive rows of a file."""

    num_rows: int

    def rows(self, places: Sequence[int]) -> list[RawRow]:
        """The rows at these places, counted from 0."""

    def column(self, name: str) -> pa.Array:
        """A column's cells as texts; null where one is missing, or neither a text nor a whole number, or not UTF-8."""


class RowList:
    """A batch of rows that were read one by one."""

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
    """Texts, and whole numbers as texts; null for all else, and for a text with a lone surrogate (no UTF-8)."""
    cells = [cell if type(cell) is str else str(cell) if type(cell) is int else None for cell in cells]
    try:
        return pa.array(cells, pa.string())
    except UnicodeEncodeError:
        return pa.array([cell if cell is not None and _is_utf8(cell) else None for cell in cells], pa.string())


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def in_batches(rows: Iterable[tuple[RawRow, int]]) -> Iterator[RowList]:
    """Collect rows, each with the characters that it takes. Where reading fails, those before come as a batch first."""
    batch: list[RawRow] = []
    num_chars = 0
    try:
        for row, size in rows:
            batch.append(row)
            num_chars += size
            if len(batch) == BATCH_ROWS or num_chars >= BATCH_CHARS:
                yield RowList(batch)
                batch, num_chars = [], 0
    except Exception:
        if batch:
            yield RowList(batch)
        raise
    if batch:
        yield RowList(batch)
