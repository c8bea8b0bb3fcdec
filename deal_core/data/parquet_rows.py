"""Rows of a Parquet file, a batch at a time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.data.batches import BATCH_CHARS, BATCH_ROWS, text_array
from deal_core.data.lines import MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO, open_bytes
from deal_core.data.rows import RawRow
from deal_core.errors import DataValidationError

_MIN_BATCH_ROWS = 256
_KINDS_OF_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """The file, read page by page; one in a gzip wrapper is unpacked to disk first, for it is read from its end."""
    with ExitStack() as stack:
        source: Any = stack.enter_context(open_bytes(path))
        if not source.seekable():
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(source, unpacked, 2**20)
            unpacked.seek(0)
            source = unpacked
        file = stack.enter_context(pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False))
        groups = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
        if sum(groups) > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size):
            raise DataValidationError(
                f"{path.name} unpacks to more than {MAX_UNPACKED_RATIO} times its size, which text does not; "
                "if that is meant, write it without compression."
            )
        yield file


def read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[ParquetBatch]:
    """The file's rows; `values` holds the wanted columns, `raw` all of them."""
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        wanted = [i for i, name in enumerate(names) if columns is None or name in columns]
        first = 1
        for batch in file.iter_batches(batch_size=_batch_size(file.metadata), use_threads=False):
            yield ParquetBatch(batch, wanted, first)
            first += batch.num_rows


def _batch_size(metadata: pq.FileMetaData) -> int:
    """Rows that take about half a megabyte, in the row group whose rows are the largest."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1.0)
    return int(min(BATCH_ROWS, max(_MIN_BATCH_ROWS, BATCH_CHARS / max(row_bytes, 1.0))))


class ParquetBatch:
    """A batch of a Parquet file's rows, see `RowBatch`."""

    def __init__(self, batch: pa.RecordBatch, wanted: Sequence[int], first: int) -> None:
        self._batch = batch
        self._wanted = wanted
        self._first = first
        self.num_rows: int = batch.num_rows

    def rows(self, places: Sequence[int]) -> list[RawRow]:
        """See `RowBatch.rows`."""
        values = _batch_rows(self._batch.select(self._wanted).take(pa.array(places, pa.int64())))
        return [
            RawRow(number=self._first + place, values=row, whole=partial(_parquet_raw, self._batch, place))
            for place, row in zip(places, values, strict=True)
        ]

    def column(self, name: str) -> pa.Array:
        """See `RowBatch.column`."""
        cells = self._batch.column(self._batch.schema.get_all_field_indices(name)[-1])
        if pa.types.is_dictionary(cells.type):
            cells = cells.dictionary_decode()
        if not any(is_kind(cells.type) for is_kind in _KINDS_OF_TEXT):
            return pa.nulls(len(cells), pa.string())
        try:
            cells.validate(full=True)
        except pa.ArrowInvalid:  # a text that is not UTF-8
            return text_array(_cells(cells))
        return cells.cast(pa.string())


def _parquet_raw(batch: pa.RecordBatch, index: int) -> Any:
    return _batch_rows(batch.slice(index, 1))[0]


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The batch's rows. A text that is not UTF-8 keeps its bytes, for the row's check to find."""
    cells = [_cells(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*cells, strict=True)]


def _cells(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):  # a text that is not UTF-8 (UnicodeDecodeError), a date beyond Python's
        return [_cell(column, index) for index in range(len(column))]


def _cell(column: pa.Array, index: int) -> Any:
    try:
        return column[index].as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)
    except (ValueError, OverflowError):
        return str(column.slice(index, 1))
