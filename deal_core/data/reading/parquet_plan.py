"""How many rows of a Parquet file are decoded at a time, so that neither they nor one of their pages fill memory."""

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
"""What the rows that are decoded together may take."""
_MAX_PAGE_BYTES = 2**27
"""The largest pages of the columns together: of each column one page is in memory, whole."""
_MAX_DELTA_BYTES = 2**28
"""What the texts of a list column that are stored as differences may take: how long one row's are cannot be told."""
_FREE_VALUES, _VALUES_PER_BYTE = 2**24, 8
"""A list column may have so many values, or so many for each byte of the file: all may stand in one row."""

_OFFSET_BYTES = 8


class DecodingPlan(NamedTuple):
    """How a file is decoded."""

    runs: list[tuple[int, list[int]]]
    """Rows at a time, and the row groups, in order, that are decoded so."""
    as_dictionary: list[str]
    """Paths of columns of lists whose texts stay in their dictionary, for a few bytes may repeat a long one."""


class _Column(NamedTuple):
    """One column chunk."""

    path: str
    is_list: bool
    pages: ChunkPages


def plan_decoding(file: pq.ParquetFile, source: BinaryIO, path: Path, piece_rows: int) -> DecodingPlan:
    """Look at the headers of all pages and see how the file can be decoded within bounds.

    Args:
        file: The file.
        source: The same, to read its pages' headers from.
        path: Where it lies, for its size and for messages.
        piece_rows: How many rows are decoded together where they may not be large.

    Raises:
        DataValidationError: It cannot, or a page has no header.
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
    """So many rows take no more than _PIECE_BYTES, whatever they are; at least 1."""
    largest = sum(column.pages.largest_page for column in columns)
    if largest > _MAX_PAGE_BYTES:
        raise DataValidationError(
            f"{path.name} has pages of {largest / 2**20:,.0f} MiB, which is no file of rows of text; write it with "
            "smaller pages (data_page_size of pyarrow) or shorter texts."
        )
    flat = [column.pages for column in columns if not column.is_list]
    repeated = sum(pages.longest_repeated for pages in flat)
    # Rows that stand side by side lie in so many pages and two more, each of which they may fill.
    fewest = min((pages.fewest_values for pages in flat), default=1)
    by_page = fewest * max(0, _PIECE_BYTES // max(1, largest) - 2) if fewest < 2**16 else fewest
    return max(1, min(_PIECE_BYTES // max(1, repeated), by_page))


def _check_lists(column: _Column, path: Path, size: int) -> bool:
    """Whether a column's texts must stay in their dictionary, for all of them may stand in one row."""
    if not column.is_list:
        return False
    num_values, longest = column.pages.num_values, column.pages.longest_repeated
    if num_values > max(_FREE_VALUES, _VALUES_PER_BYTE * size):
        raise DataValidationError(
            f"{path.name} has {num_values:,} values in lists, more than {_VALUES_PER_BYTE} for each of its bytes; "
            f"leave out the column {column.path}."
        )
    if column.pages.has_delta_texts and num_values * longest > _MAX_DELTA_BYTES:
        raise DataValidationError(
            f"{path.name} holds texts of lists as differences (DELTA_BYTE_ARRAY), which may unpack to any size; write "
            f"the column {column.path} with another encoding."
        )
    return num_values * longest > _PIECE_BYTES


def decoded_size(cells: Any) -> int:
    """Bytes that an array's or a batch's cells take, with each text of a dictionary as often as it stands there."""
    if isinstance(cells, pa.RecordBatch):
        return sum(decoded_size(column) for column in cells.columns)
    if pa.types.is_dictionary(cells.type):
        texts = pc.sum(pc.binary_length(cells.dictionary).take(cells.indices)).as_py()  # Arrow reads only texts so
        return int(texts or 0) + int(cells.indices.nbytes)
    if pa.types.is_nested(cells.type) and _holds_dictionary(cells.type):
        if pa.types.is_struct(cells.type):
            return sum(decoded_size(field) for field in cells.flatten())
        return _OFFSET_BYTES * len(cells) + decoded_size(cells.flatten())  # its nbytes have the whole dictionary
    return int(cells.nbytes)


def _holds_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) or any(
        _holds_dictionary(kind.field(index).type) for index in range(kind.num_fields)
    )


def too_much(path: Path, ratio: int) -> DataValidationError:
    """What is said of a file whose content is out of proportion to its size."""
    return DataValidationError(
        f"{path.name} unpacks to more than {ratio} times its size, which text does not; if that is meant, write it "
        "without compression and without dictionaries."
    )
