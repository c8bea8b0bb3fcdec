"""Rows of a file some at a time: one by one, and a column at a time where their cells are plain texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from deal_core.data.rows import RawRow

BATCH_ROWS = 4096
BATCH_CHARS = 2**19
"""A batch has no more of either, unless it is of one row (in Parquet one piece) that is larger."""

Item = TypeVar("Item")


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
        return pa.array([cell if cell is not None and is_utf8(cell) else None for cell in cells], pa.string())


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8: it has no lone surrogate, as bytes that were no UTF-8 leave."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def grouped(items: Iterable[tuple[Item, int]], max_items: int) -> Iterator[list[Item]]:
    """Items, each given with its size, in lists of at most BATCH_CHARS; a larger one has a list to itself.

    Where reading them fails, those before come first.
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
