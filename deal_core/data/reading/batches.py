"""Consecutive rows of a file, as the process that reads the file gave them: the columns of Parquet, or rows of JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from deal_core.data.reading.parquet_rows import cells_of, rows_of
from deal_core.data.rows import Problem, RawRow
from deal_core.data.schema import Doubt

NO_CELL = object()
"""Stands in a column for a row that does not have it."""
_FEW = 16
"""Rows of Parquet are taken one by one if they are fewer than this part of their batch."""


class ParquetRows:
    """Rows of a Parquet file. All of them can be read, and none looks wrong."""

    def __init__(self, cells: pa.RecordBatch, number: int, columns: Collection[str] | None) -> None:
        self._batch, self._number, self._columns = cells, number, columns
        self.faults: dict[int, Problem] = {}
        self.doubts: dict[int, Doubt] = {}

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def rows(self, places: Sequence[int] | None = None) -> list[RawRow]:
        """The rows at these places, counted from 0; None: all. For the columns see `rows_of`."""
        if places is None:
            return self._rows
        if len(places) * _FEW > len(self):
            return [self._rows[place] for place in places]
        slices = ((self._batch.slice(place, 1), self._number + place) for place in places)
        return [row for piece, number in slices for row in rows_of(piece, number, self._columns)]

    def numbers(self, places: Sequence[int]) -> list[int]:
        """The numbers of the rows at these places, see `RawRow.number`."""
        return [self._number + place for place in places]

    def cells(self, column: str) -> list[Any]:
        """A column's cell in each row, or NO_CELL. Of columns of one name the last counts, as in a row's dict."""
        indices = self._batch.schema.get_all_field_indices(column)
        return cells_of(self._batch.column(indices[-1])) if indices else [NO_CELL] * len(self)

    @cached_property
    def _rows(self) -> list[RawRow]:
        return rows_of(self._batch, self._number, self._columns)


class RowList:
    """Rows that are Python objects already, such as those of a text file. Its methods are those of `ParquetRows`."""

    def __init__(self, rows: Sequence[RawRow]) -> None:
        self._rows = rows
        self.faults = {place: row.fault for place, row in enumerate(rows) if row.fault is not None}
        """Why rows could not be read, by their places."""
        self.doubts = {place: row.doubt for place, row in enumerate(rows) if row.doubt is not None}
        """What looks wrong about rows, by their places."""

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, places: Sequence[int] | None = None) -> list[RawRow]:
        """The rows at these places; None: all."""
        return [*self._rows] if places is None else [self._rows[place] for place in places]

    def numbers(self, places: Sequence[int]) -> list[int]:
        """Their numbers in the file."""
        return [self._rows[place].number for place in places]

    def cells(self, column: str) -> list[Any]:
        """A column's cell in each row, or NO_CELL."""
        return [row.values.get(column, NO_CELL) for row in self._rows]


RowBatch = ParquetRows | RowList
"""Consecutive rows of a file."""


def sent_rows(content: bytes) -> RowList:
    """The rows of a text file, which the process that reads it sent as JSON."""
    return RowList([_row(*values) for values in from_json(content)])


def from_json(content: bytes) -> Any:
    """The value of JSON that the process which reads a file has written; a text may have lone surrogates."""
    return json.loads(content.decode("utf-8", "surrogatepass"))


def _row(
    number: int, values: dict[str, Any], line: int | None, fault: list[Any] | None, raw: Any, doubt: Doubt | None
) -> RawRow:
    if fault is None:
        return RawRow(number, values, line, doubt=doubt)
    return RawRow(number, values, line, Problem(*fault), whole=lambda: raw, doubt=doubt)
