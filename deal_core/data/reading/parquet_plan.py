"""Plan how many rows of a Parquet file are decoded at a time, so that rows and pages fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deal_core.data.reading.lines import MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO, too_many_rows
from deal_core.data.reading.parquet_pages import ChunkPages, PageError, look_at_chunk
from deal_core.errors import DataValidationError

_PIECE_BYTES = 2**26
"""Most bytes of rows that are decoded together."""
_MAX_PAGE_BYTES = 2**27
"""Most bytes of the columns' largest pages together: one whole page per column is in memory."""
_MAX_DELTA_BYTES = 2**28
"""Most bytes of a list column's texts that are stored as differences: the length of one row's texts is unknown."""
_FREE_VALUES, _VALUES_PER_BYTE = 2**24, 8
"""Most values of a list column, in total and per byte of the file (the larger counts): all may be in one row."""

_OFFSET_BYTES = 8


class DecodingPlan(NamedTuple):
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


def plan_decoding(file: pq.ParquetFile, source: BinaryIO, path: Path, piece_rows: int) -> DecodingPlan:
    """Read the headers of all pages and plan how to decode the file within bounds.

    Args:
        file: The file.
        source: The same file's bytes, for the page headers.
        path: The file's path, for its size and for messages.
        piece_rows: Number of rows that are decoded together if they are small.

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
            raise too_much(path, MAX_UNPACKED_RATIO)
        as_dictionary |= {column.path for column in columns if _check_lists(column, path, size)}
        row_counts.append(min(piece_rows, _rows_at_a_time(columns, path)))
    if as_dictionary:  # Arrow cannot put a list's dictionaries of two row groups into one batch
        return DecodingPlan([(count, [index]) for index, count in enumerate(row_counts)], sorted(as_dictionary))
    runs = groupby(enumerate(row_counts), key=itemgetter(1))
    return DecodingPlan([(count, [index for index, _ in run]) for count, run in runs], [])


def _look(
    file: pq.ParquetFile, source: BinaryIO, path: Path, chunk: pq.ColumnChunkMetaData, index: int
) -> _Column:
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


def too_much(path: Path, ratio: int) -> DataValidationError:
    """The error for a file whose content is too large for its size."""
    return DataValidationError(
        f"{path.name} unpacks to more than {ratio} times its size, which text does not. If the file is right, write it "
        "without compression and without dictionaries."
    )
