"""Read the rows of a Parquet file in batches.

A plan, made from the page headers, bounds the rows and pages that are in memory together.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deal_core.data.reading.lines import (
    MAX_LINE_CHARS,
    MAX_UNPACKED_BYTES,
    MAX_UNPACKED_RATIO,
    open_bytes,
    too_many_rows,
)
from deal_core.data.reading.parquet_pages import ChunkPages, PageError, look_at_chunk
from deal_core.data.rows import BATCH_ROWS, Problem, RawRow, grouped, text_array
from deal_core.errors import DataValidationError

_PIECE_ROWS = 256
"""Rows that are decoded together if they are small."""
_PIECE_BYTES = 2**26
"""Most bytes of rows that are decoded together."""
_MAX_PAGE_BYTES = 2**27
"""Most bytes of the columns' largest pages together: one whole page per column is in memory."""
_MAX_DELTA_BYTES = 2**28
"""Most bytes of a list column's texts that are stored as differences: the length of one row's texts is unknown."""
_FREE_VALUES, _VALUES_PER_BYTE = 2**24, 8
"""Most values of a list column, in total and per byte of the file (the larger counts): all may be in one row."""
_OFFSET_BYTES = 8
_PART_BYTES = 2**24
"""Most bytes of rows that become Python objects together; a single row may be larger."""
MAX_DECODED_RATIO = 1000
"""All cells of a file may take this many times its size, or MAX_UNPACKED_BYTES. Repeated texts are stored once."""
_NO_PYTHON_VALUE = (ValueError, OverflowError, KeyError, RecursionError)
"""Errors of a text that is not UTF-8, a date beyond Python's range, an unknown time zone, or too deep nesting."""
_KINDS_OF_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file to be read page by page. A gzip file is first unpacked to disk, because Parquet needs seeking."""
    with _open_source(path) as source:
        yield _parquet_file(source, path)


def read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[ParquetBatch]:
    """The file's rows; `values` holds the wanted columns, `raw` all columns."""
    with _open_source(path) as source:
        file = _parquet_file(source, path)
        plan = _plan_decoding(file, source, path)
        if plan.as_dictionary:
            file = _parquet_file(source, path, read_dictionary=plan.as_dictionary)
        names = file.schema_arrow.names
        wanted = [i for i, name in enumerate(names) if columns is None or name in columns]
        first = 1
        for group in grouped(_sized_pieces(file, plan, path), BATCH_ROWS // _PIECE_ROWS):
            batch = ParquetBatch(group, wanted, first)
            yield batch
            first += batch.num_rows


@contextmanager
def _open_source(path: Path) -> Iterator[Any]:
    with ExitStack() as stack:
        source: Any = stack.enter_context(open_bytes(path))
        if not source.seekable():
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(source, unpacked, 2**20)
            unpacked.seek(0)
            source = unpacked
        yield source


def _parquet_file(source: Any, path: Path, **options: Any) -> pq.ParquetFile:
    file = pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False, **options)
    groups = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
    if sum(groups) > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size):
        raise _too_much(path, MAX_UNPACKED_RATIO)
    return file


def _sized_pieces(file: pq.ParquetFile, plan: _DecodingPlan, path: Path) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Pieces of a few rows with their bytes. The size of rows is known only after they are unpacked."""
    left = max(MAX_UNPACKED_BYTES, MAX_DECODED_RATIO * path.stat().st_size)
    for num_rows, groups in plan.runs:
        for piece in file.iter_batches(batch_size=num_rows, row_groups=groups, use_threads=False):
            size = decoded_size(piece)
            left -= size
            if left < 0:
                raise _too_much(path, MAX_DECODED_RATIO)
            yield from _split(piece, size)


def _split(piece: pa.RecordBatch, size: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Split a piece into parts of at most _PART_BYTES; a single row may be larger."""
    if size <= _PART_BYTES or piece.num_rows == 1:
        yield piece, size
        return
    middle = piece.num_rows // 2
    for part in (piece.slice(0, middle), piece.slice(middle)):
        yield from _split(part, decoded_size(part))


class ParquetBatch:
    """A batch of rows of a Parquet file, see `RowBatch`."""

    def __init__(self, pieces: Sequence[pa.RecordBatch], wanted: Sequence[int], first: int) -> None:
        self._pieces = pieces
        self._wanted = wanted
        self._first = first
        self._over_long = [_over_long_rows(piece) for piece in pieces]
        self.num_rows: int = sum(piece.num_rows for piece in pieces)

    def rows(self, places: Sequence[int]) -> list[RawRow]:
        """See `RowBatch.rows`. A row of more than MAX_LINE_CHARS bytes is bad, as in a text file."""
        found: dict[int, RawRow] = {}
        start = 0
        for piece, over_long in zip(self._pieces, self._over_long, strict=True):
            here = [place - start for place in places if start <= place < start + piece.num_rows]
            first = self._first + start
            for index in over_long.intersection(here):
                found[start + index] = _over_long_row(piece, index, first + index)
            here = [index for index in here if index not in over_long]
            for index, values in zip(here, _pick_rows(piece.select(self._wanted), here), strict=True):
                found[start + index] = RawRow(first + index, values, whole=partial(_row, piece, index))
            start += piece.num_rows
        return [found[place] for place in places]

    def column(self, name: str) -> pa.Array:
        """See `RowBatch.column`; cells of rows that are too long are null too."""
        index = self._pieces[0].schema.get_all_field_indices(name)[-1]
        return pa.concat_arrays(
            [_short_texts(piece.column(index), rows) for piece, rows in zip(self._pieces, self._over_long, strict=True)]
        )


def _over_long_rows(piece: pa.RecordBatch) -> set[int]:
    """Places of the rows with more than MAX_LINE_CHARS bytes."""
    if decoded_size(piece) <= MAX_LINE_CHARS:
        return set()
    return {row for row in range(piece.num_rows) if decoded_size(piece.slice(row, 1)) > MAX_LINE_CHARS}


def _over_long_row(piece: pa.RecordBatch, index: int, number: int) -> RawRow:
    """A row that is too large to become Python objects. Quarantine keeps the size of each cell instead."""
    sizes = {
        f"bytes of {name}": decoded_size(column.slice(index, 1))
        for name, column in zip(piece.schema.names, piece.columns, strict=True)
    }
    why = f"more than {MAX_LINE_CHARS} bytes in a row"
    fault = Problem("over-long text", why, why)
    return RawRow(number=number, values={}, fault=fault, whole=partial(dict, sizes))


def _short_texts(cells: pa.Array, over_long: Set[int]) -> pa.Array:
    """The cells as `text_array` gives them. Rows that are too long get null, and their text is not read."""
    if not over_long:
        return _texts(cells)
    nothing = pa.nulls(1, pa.string())
    return pa.concat_arrays([nothing if row in over_long else _texts(cells.slice(row, 1)) for row in range(len(cells))])


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


def _pick_rows(batch: pa.RecordBatch, places: Sequence[int]) -> list[dict[str, Any]]:
    """Some of the batch's rows; Arrow's `take` does not support every type."""
    if len(places) < batch.num_rows // 4:
        return [_row(batch, place) for place in places]
    rows = _batch_rows(batch)
    return [rows[place] for place in places]


def _row(batch: pa.RecordBatch, place: int) -> dict[str, Any]:
    return _batch_rows(batch.slice(place, 1))[0]


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The batch's rows. A text that is not UTF-8 stays bytes, which the row's check finds."""
    cells = [_cells(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*cells, strict=True)]


def _cells(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except _NO_PYTHON_VALUE:
        return [_cell(column, index) for index in range(len(column))]


def _cell(column: pa.Array, index: int) -> Any:
    try:
        return column[index].as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)
    except _NO_PYTHON_VALUE:
        return str(column.slice(index, 1))


class _DecodingPlan(NamedTuple):
    """Row counts and columns for decoding a file."""

    runs: list[tuple[int, list[int]]]
    """Rows per piece, and the row groups in order that are decoded in such pieces."""
    as_dictionary: list[str]
    """Paths of list columns whose texts stay in their dictionary, because a few bytes may repeat a long text."""


class _Column(NamedTuple):
    """One column chunk."""

    path: str
    is_list: bool
    pages: ChunkPages


def _plan_decoding(file: pq.ParquetFile, source: BinaryIO, path: Path) -> _DecodingPlan:
    """Read the headers of all pages (in `source`, the file's bytes), and plan how to decode the file within bounds.

    Raises:
        DataValidationError: The file cannot be decoded within bounds, or a page header cannot be read.
    """
    metadata = file.metadata
    size = path.stat().st_size
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    num_rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    if problem := too_many_rows(path.name, num_rows, size):
        raise problem
    row_counts, as_dictionary, unpacked = [], set(), 0
    for group in groups:
        columns = [_look(file, source, path, group.column(index), index) for index in range(group.num_columns)]
        unpacked += sum(column.pages.unpacked_bytes for column in columns)
        if unpacked > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * size):
            raise _too_much(path, MAX_UNPACKED_RATIO)
        as_dictionary |= {column.path for column in columns if _check_lists(column, path, size)}
        row_counts.append(min(_PIECE_ROWS, _rows_at_a_time(columns, path)))
    if as_dictionary:  # Arrow cannot put a list's dictionaries of two row groups into one batch
        return _DecodingPlan([(count, [index]) for index, count in enumerate(row_counts)], sorted(as_dictionary))
    runs = groupby(enumerate(row_counts), key=itemgetter(1))
    return _DecodingPlan([(count, [index for index, _ in run]) for count, run in runs], [])


def _look(file: pq.ParquetFile, source: BinaryIO, path: Path, chunk: pq.ColumnChunkMetaData, index: int) -> _Column:
    try:
        pages = look_at_chunk(source, chunk, _MAX_PAGE_BYTES)
    except PageError as error:
        raise DataValidationError(
            f"{path.name} cannot be read, it is damaged or was cut off ({error}); write or upload it again."
        ) from None
    return _Column(chunk.path_in_schema, file.schema.column(index).max_repetition_level > 0, pages)


def _rows_at_a_time(columns: Sequence[_Column], path: Path) -> int:
    """Number of rows, at least 1, that take at most _PIECE_BYTES with any content."""
    largest = sum(column.pages.largest_page for column in columns)
    if largest > _MAX_PAGE_BYTES:
        raise DataValidationError(
            f"{path.name} has pages of {largest / 2**20:,.0f} MiB, too large for rows of text; write it with "
            "smaller pages (data_page_size of pyarrow) or shorter texts."
        )
    flat = [column.pages for column in columns if not column.is_list]
    repeated = sum(pages.longest_repeated for pages in flat)
    # Consecutive rows may fill all pages that they cross, and two more at the ends.
    fewest = min((pages.fewest_values for pages in flat), default=1)
    by_page = fewest * max(0, _PIECE_BYTES // max(1, largest) - 2) if fewest < 2**16 else fewest
    return max(1, min(_PIECE_BYTES // max(1, repeated), by_page))


def _check_lists(column: _Column, path: Path, size: int) -> bool:
    """Whether a column's texts must stay in their dictionary, because all of them may be in one row."""
    if not column.is_list:
        return False
    num_values, longest = column.pages.num_values, column.pages.longest_repeated
    if num_values > max(_FREE_VALUES, _VALUES_PER_BYTE * size):
        raise DataValidationError(
            f"{path.name} has {num_values:,} values in lists, more than {_VALUES_PER_BYTE} per byte of the file; "
            f"leave out the column {column.path}."
        )
    if column.pages.has_delta_texts and num_values * longest > _MAX_DELTA_BYTES:
        raise DataValidationError(
            f"{path.name} holds texts of lists as differences (DELTA_BYTE_ARRAY), which may unpack to any size; write "
            f"the column {column.path} with another encoding."
        )
    return num_values * longest > _PIECE_BYTES


def decoded_size(cells: Any) -> int:
    """Bytes of an array's or a batch's cells; a dictionary's text counts once per cell that holds it."""
    if isinstance(cells, pa.RecordBatch):
        return sum(decoded_size(column) for column in cells.columns)
    if pa.types.is_dictionary(cells.type):
        texts = pc.sum(pc.binary_length(cells.dictionary).take(cells.indices)).as_py()  # always texts in Arrow
        return int(texts or 0) + int(cells.indices.nbytes)
    if pa.types.is_nested(cells.type) and _holds_dictionary(cells.type):
        if pa.types.is_struct(cells.type):
            return sum(decoded_size(field) for field in cells.flatten())
        return _OFFSET_BYTES * len(cells) + decoded_size(cells.flatten())  # its nbytes include the whole dictionary
    return int(cells.nbytes)


def _holds_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) or any(
        _holds_dictionary(kind.field(index).type) for index in range(kind.num_fields)
    )


def _too_much(path: Path, ratio: int) -> DataValidationError:
    """The error for a file whose content is too large for its size."""
    return DataValidationError(
        f"{path.name} unpacks to more than {ratio} times its size, which text does not. If the file is right, write it "
        "without compression and without dictionaries."
    )
