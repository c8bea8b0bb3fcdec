"""Consecutive rows of a file, as the process that reads the file gave them: the columns of Parquet, or rows of JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa

from deal_core.data.reading.parquet_rows import rows_of
from deal_core.data.rows import Problem, RawRow
from deal_core.data.schema import Doubt

_FEW = 16
"""Rows of Parquet are taken one by one if they are fewer than this part of their batch."""


class RowBatch(Protocol):
    """Consecutive rows of a file."""

    @property
    def doubts(self) -> dict[int, Doubt]:
        """What looks wrong about rows of the file, by their places."""

    def __len__(self) -> int: ...

    def rows(self, places: Sequence[int] | None = None) -> list[RawRow]:
        """The rows at these places, counted from 0; None: all."""

    def numbers(self, places: Sequence[int]) -> list[int]:
        """The numbers of the rows at these places, see `RawRow.number`."""

    def texts(self, column: str) -> pa.Array:
        """The column's texts, and whole numbers as texts; null for any other cell, and where there is none."""


class ParquetRows:
    """Rows of a Parquet file."""

    def __init__(self, cells: pa.RecordBatch, number: int, columns: Collection[str] | None) -> None:
        self.cells, self.number = cells, number
        self.doubts: dict[int, Doubt] = {}
        self._columns = columns

    def __len__(self) -> int:
        return int(self.cells.num_rows)

    def rows(self, places: Sequence[int] | None = None) -> list[RawRow]:
        """See `RowBatch.rows`; for the columns see `rows_of`."""
        if places is None:
            return self._rows
        if len(places) * _FEW > len(self):
            return [self._rows[place] for place in places]
        slices = ((self.cells.slice(place, 1), self.number + place) for place in places)
        return [row for piece, number in slices for row in rows_of(piece, number, self._columns)]

    def numbers(self, places: Sequence[int]) -> list[int]:
        """See `RowBatch.numbers`."""
        return [self.number + place for place in places]

    def texts(self, column: str) -> pa.Array:
        """See `RowBatch.texts`. Bytes that are not UTF-8 stay in a text."""
        index = self.cells.schema.get_field_index(column)
        kind = self.cells.schema.types[index] if index >= 0 else pa.null()
        if pa.types.is_string(kind):
            return self.cells.column(index)
        if pa.types.is_large_string(kind) or pa.types.is_integer(kind):
            return self.cells.column(index).cast(pa.string())
        return pa.nulls(len(self), pa.string())

    @cached_property
    def _rows(self) -> list[RawRow]:
        return rows_of(self.cells, self.number, self._columns)


class JsonRows:
    """Rows of a text file, which the process that reads it sent as JSON."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, places: Sequence[int] | None = None) -> list[RawRow]:
        """See `RowBatch.rows`."""
        return self._rows if places is None else [self._rows[place] for place in places]

    def numbers(self, places: Sequence[int]) -> list[int]:
        """See `RowBatch.numbers`."""
        return [self._rows[place].number for place in places]

    @cached_property
    def doubts(self) -> dict[int, Doubt]:
        """See `RowBatch.doubts`."""
        return {place: row.doubt for place, row in enumerate(self._rows) if row.doubt is not None}

    def texts(self, column: str) -> pa.Array:
        """See `RowBatch.texts`. A text with a lone surrogate is null too, for Arrow has only UTF-8."""
        cells = [row.values.get(column) for row in self._rows]
        texts = [cell if type(cell) is str else str(cell) if type(cell) is int else None for cell in cells]
        try:
            return pa.array(texts, pa.string())
        except UnicodeEncodeError:
            return pa.array([text if text is not None and _is_utf8(text) else None for text in texts], pa.string())

    @cached_property
    def _rows(self) -> list[RawRow]:
        return [_row(*values) for values in from_json(self.content)]


def from_json(content: bytes) -> Any:
    """The value of JSON that the process which reads a file has written; a text may have lone surrogates."""
    return json.loads(content.decode("utf-8", "surrogatepass"))


def _row(
    number: int, values: dict[str, Any], line: int | None, fault: list[Any] | None, raw: Any, doubt: Doubt | None
) -> RawRow:
    if fault is None:
        return RawRow(number, values, line, doubt=doubt)
    return RawRow(number, values, line, Problem(*fault), whole=lambda: raw, doubt=doubt)


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
