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

from deal_core.data.batches import BATCH_ROWS, grouped, text_array
from deal_core.data.lines import MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO, open_bytes
from deal_core.data.rows import RawRow
from deal_core.errors import DataValidationError

_PIECE_ROWS = 256
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
        # How large a few rows are is known only once they are unpacked, so few are at a time.
        pieces = ((piece, piece.nbytes) for piece in file.iter_batches(batch_size=_PIECE_ROWS, use_threads=False))
        for group in grouped(pieces, BATCH_ROWS // _PIECE_ROWS):
            batch = ParquetBatch(group, wanted, first)
            yield batch
            first += batch.num_rows


class ParquetBatch:
    """A batch of a Parquet file's rows, see `RowBatch`."""

    def __init__(self, pieces: Sequence[pa.RecordBatch], wanted: Sequence[int], first: int) -> None:
        self._pieces = pieces
        self._wanted = wanted
        self._first = first
        self.num_rows: int = sum(piece.num_rows for piece in pieces)

    def rows(self, places: Sequence[int]) -> list[RawRow]:
        """See `RowBatch.rows`."""
        found: dict[int, RawRow] = {}
        start = 0
        for piece in self._pieces:
            here = [place - start for place in places if start <= place < start + piece.num_rows]
            for index, values in zip(here, _pick_rows(piece.select(self._wanted), here), strict=True):
                whole = partial(_parquet_raw, piece, index)
                found[start + index] = RawRow(number=self._first + start + index, values=values, whole=whole)
            start += piece.num_rows
        return [found[place] for place in places]

    def column(self, name: str) -> pa.Array:
        """See `RowBatch.column`."""
        index = self._pieces[0].schema.get_all_field_indices(name)[-1]
        return pa.concat_arrays([_texts(piece.column(index)) for piece in self._pieces])


def _texts(cells: pa.Array) -> pa.Array:
    """The cells as `text_array` gives them."""
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


def _pick_rows(batch: pa.RecordBatch, places: Sequence[int]) -> list[dict[str, Any]]:
    """Some of the batch's rows; Arrow's own `take` does not know every type."""
    if len(places) < batch.num_rows // 4:
        return [_batch_rows(batch.slice(place, 1))[0] for place in places]
    rows = _batch_rows(batch)
    return [rows[place] for place in places]


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
