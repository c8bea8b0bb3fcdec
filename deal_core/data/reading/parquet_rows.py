"""Read the rows of a Parquet file, a few at a time.

A few bytes of a file can repeat a long text of its dictionary in every row. Therefore Arrow shows the dictionaries of
each row group first, and they decide how its rows are read. The sizes that the file's footer names are believed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deal_core.data.reading.lines import (
    MAX_LINE_CHARS,
    MAX_UNPACKED_BYTES,
    MAX_UNPACKED_RATIO,
    check_num_rows,
    open_bytes,
)
from deal_core.data.rows import Problem, RawRow
from deal_core.errors import DataValidationError

_PIECE_ROWS = 256
_PIECE_BYTES = 2**26
"""Rows that are decoded together, and most of their bytes with any content."""
_UNKNOWN = 2**40
_MAX_DELTA_BYTES = 2**28
"""Most bytes of texts that are decoded together if they are stored as differences from earlier texts."""
_FREE_VALUES, _VALUES_PER_BYTE = 2**24, 8
"""Most values of a column's part, in total and per byte of the file (the larger counts). One list may hold them all."""
MAX_DECODED_RATIO = 1000
"""All cells of a file may take this many times its size, or MAX_UNPACKED_BYTES. Repeated texts are stored once."""
_NO_PYTHON_VALUE = (ValueError, OverflowError, KeyError, RecursionError)
"""Errors of a text that is not UTF-8, a date beyond Python's range, an unknown time zone, or too deep nesting."""


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file to be read page by page. A gzip file is first unpacked to disk, because Parquet needs seeking.

    Raises:
        DataValidationError: The file holds too much for its size.
    """
    with _open_source(path) as source:
        yield _parquet_file(source, path)


@contextmanager
def _open_source(path: Path) -> Iterator[Any]:
    try:
        with open_bytes(path) as packed, tempfile.TemporaryFile() as unpacked:
            if packed.seekable():
                yield packed
            else:
                shutil.copyfileobj(packed, unpacked, 2**20)
                unpacked.seek(0)
                yield unpacked
    finally:
        pa.default_memory_pool().release_unused()  # Arrow keeps what one large cell took


def _parquet_file(source: Any, path: Path) -> pq.ParquetFile:
    file = pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False)
    _check_footer(file.metadata, path)
    return file


def read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[tuple[RawRow, int]]:
    """The file's rows, each with its bytes; `values` holds the wanted columns, `raw` all columns.

    A row of more than MAX_LINE_CHARS bytes is bad, as in a text file.
    """
    with _open_source(path) as source:
        file = _parquet_file(source, path)
        packed = pq.ParquetFile(
            source,
            metadata=file.metadata,
            buffer_size=2**20,
            pre_buffer=False,
            read_dictionary=_columns_with_dictionary(file),
        )
        names = file.schema_arrow.names
        wanted = [i for i, name in enumerate(names) if columns is None or name in columns]
        left = max(MAX_UNPACKED_BYTES, MAX_DECODED_RATIO * path.stat().st_size)
        number = 1
        for piece in _pieces(file, packed):
            size = decoded_size(piece)
            left -= size
            if left < 0:
                raise _too_much(path, MAX_DECODED_RATIO)
            for part, part_size in _split(piece, size):
                if part_size > MAX_LINE_CHARS:
                    yield _over_long_row(part, number), part_size
                else:
                    for place, values in enumerate(_batch_rows(part.select(wanted))):
                        whole = partial(_row, part, place) if len(wanted) < len(names) else None
                        yield RawRow(number + place, values, whole=whole), part_size // part.num_rows
                number += part.num_rows


def _check_footer(metadata: pq.FileMetaData, path: Path) -> None:
    """Refuse a file that holds too much for its size."""
    size = path.stat().st_size
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    check_num_rows(path.name, sum(group.num_rows for group in groups), size)
    if sum(group.total_byte_size for group in groups) > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * size):
        raise _too_much(path, MAX_UNPACKED_RATIO)
    for group in groups:
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.num_values > max(_FREE_VALUES, _VALUES_PER_BYTE * size):
                raise DataValidationError(
                    f"{path.name} has {chunk.num_values:,} values in lists, more than {_VALUES_PER_BYTE} per byte of "
                    f"the file; leave out the column {chunk.path_in_schema}."
                )
            if chunk.num_values > group.num_rows and "DELTA_BYTE_ARRAY" in chunk.encodings:
                raise DataValidationError(
                    f"{path.name} holds texts of lists as differences (DELTA_BYTE_ARRAY), which may unpack to any "
                    f"size; write the column {chunk.path_in_schema} with another encoding."
                )


def _columns_with_dictionary(file: pq.ParquetFile) -> list[str]:
    """The columns of texts that Arrow can leave in their dictionaries."""
    metadata, columns = file.metadata, [file.schema.column(index) for index in range(len(file.schema.names))]
    return [
        column.path
        for index, column in enumerate(columns)
        if column.physical_type == "BYTE_ARRAY"
        and not any(
            "DELTA" in encoding
            for group in range(metadata.num_row_groups)
            for encoding in metadata.row_group(group).column(index).encodings
        )
    ]


def _pieces(file: pq.ParquetFile, packed: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """A few rows at a time; `packed` is the same file, and its texts stay in their dictionaries.

    The dictionaries of `packed` grow with every new text of a row group, so `file` is read where it can be.
    """
    for index in range(file.metadata.num_row_groups):
        group, source = file.metadata.row_group(index), file
        num_rows = _rows_at_a_time(group)
        in_cells, in_lists = _longest_texts(packed, index, num_rows)
        most_values = max((group.column(place).num_values for place in range(group.num_columns)), default=0)
        if in_lists * most_values > _PIECE_BYTES or in_cells == _UNKNOWN:  # one row may have all values of a list
            source = packed
        else:
            num_rows = max(1, min(num_rows, _PIECE_BYTES // max(1, in_cells)))
        yield from source.iter_batches(batch_size=num_rows, row_groups=[index], use_threads=False)


def _rows_at_a_time(group: pq.RowGroupMetaData) -> int:
    """Number of rows of a row group, at least 1, that take about _PIECE_BYTES if no text is repeated."""
    fitting: int = _PIECE_BYTES * group.num_rows // max(1, group.total_byte_size)
    chunks = [group.column(index) for index in range(group.num_columns)]
    # Differences may repeat a long beginning in every row.
    of_deltas: int = sum(chunk.total_uncompressed_size for chunk in chunks if "DELTA_BYTE_ARRAY" in chunk.encodings)
    return max(1, min(_PIECE_ROWS, fitting, _MAX_DELTA_BYTES // max(1, of_deltas)))


def _longest_texts(packed: pq.ParquetFile, index: int, num_rows: int) -> tuple[int, int]:
    """Bytes of the longest texts in a row group's dictionaries: of all cells together, and of all lists together.

    They are _UNKNOWN if the first rows do not use a dictionary, so that it has not been read yet.
    """
    in_cells = in_lists = 0
    group = packed.metadata.row_group(index)
    repeating = [chunk.path_in_schema for chunk in map(group.column, range(group.num_columns)) if _may_repeat(chunk)]
    batches = packed.iter_batches(batch_size=num_rows, row_groups=[index], columns=repeating, use_threads=False)
    for batch in islice(batches, 1):
        for column in batch.columns:
            if pa.types.is_nested(column.type):
                in_lists += _longest_text(column)
            else:
                in_cells += _longest_text(column)
    return min(in_cells, _UNKNOWN), in_lists


def _may_repeat(chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether a chunk has texts, and a dictionary for them."""
    is_null = chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values
    return not is_null and any("DICTIONARY" in encoding for encoding in chunk.encodings)


def _longest_text(cells: pa.Array) -> int:
    if isinstance(cells, pa.ExtensionArray):
        return _longest_text(cells.storage)
    if pa.types.is_dictionary(cells.type):
        longest = pc.max(pc.binary_length(cells.dictionary)).as_py()
        return _UNKNOWN if longest is None else int(longest)
    if pa.types.is_struct(cells.type):
        return sum(map(_longest_text, cells.flatten()))
    return _longest_text(_flat(cells)) if pa.types.is_nested(cells.type) else 0


def _split(piece: pa.RecordBatch, size: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Split a piece into parts of at most MAX_LINE_CHARS bytes; a single row may be larger."""
    if size <= MAX_LINE_CHARS or piece.num_rows == 1:
        yield piece, size
        return
    middle = piece.num_rows // 2
    for part in (piece.slice(0, middle), piece.slice(middle)):
        yield from _split(part, decoded_size(part))


def _over_long_row(row: pa.RecordBatch, number: int) -> RawRow:
    """A row that is too large to become Python objects. Quarantine keeps the size of each cell instead."""
    sizes = {f"bytes of {name}": decoded_size(cell) for name, cell in zip(row.schema.names, row.columns, strict=True)}
    why = f"more than {MAX_LINE_CHARS} bytes in a row"
    return RawRow(number=number, values={}, fault=Problem("over-long text", why, why), whole=partial(dict, sizes))


def _row(batch: pa.RecordBatch, place: int) -> dict[str, Any]:
    return _batch_rows(batch.slice(place, 1))[0]


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The batch's rows. A text that is not UTF-8 stays bytes, which the row's check finds."""
    cells = [_cells(column) for column in batch.columns]
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]


def _cells(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return list(column.to_pylist())
    except _NO_PYTHON_VALUE:
        return [_cell(column, index) for index in range(len(column))]


def _cell(column: pa.Array, index: int) -> Any:
    try:
        return _value(column[index])
    except RecursionError:
        return "a value that is nested too deeply"


def _value(scalar: pa.Scalar) -> Any:
    """The scalar for Python. Parts that Python has no type for are texts, and a time of an unknown zone is in UTC."""
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar):
        scalar = scalar.value
    try:
        return None if scalar is None else scalar.as_py()
    except UnicodeDecodeError as error:
        if not pa.types.is_nested(scalar.type):
            return bytes(error.object)
    except _NO_PYTHON_VALUE:
        pass
    if isinstance(scalar, pa.MapScalar):
        return [(_value(pair[0]), _value(pair[1])) for pair in scalar.values]
    if isinstance(scalar, pa.ListScalar):
        return [_value(item) for item in scalar]
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(scalar[place]) for place, name in enumerate(scalar.type.names)}
    if pa.types.is_timestamp(scalar.type) and scalar.type.tz not in (None, "UTC"):
        return _value(scalar.cast(pa.timestamp(scalar.type.unit, "UTC")))  # a file holds UTC, whatever its zone
    return str(scalar.cast(pa.string()))


def decoded_size(cells: Any) -> int:
    """Bytes of an array's or a batch's cells; a dictionary's text counts once per cell that holds it."""
    if isinstance(cells, pa.RecordBatch):
        return sum(decoded_size(column) for column in cells.columns)
    if isinstance(cells, pa.ExtensionArray):
        return decoded_size(cells.storage)
    if pa.types.is_dictionary(cells.type):
        texts = pc.sum(pc.binary_length(cells.dictionary).take(cells.indices)).as_py()  # always texts in Arrow
        return int(texts or 0) + int(cells.indices.nbytes)
    if pa.types.is_struct(cells.type):
        return sum(map(decoded_size, cells.flatten()))
    if pa.types.is_nested(cells.type):
        return 8 * len(cells) + decoded_size(_flat(cells))  # its nbytes include the whole dictionary
    return int(cells.nbytes)


def _flat(lists: pa.Array) -> pa.Array:
    """The items of lists."""
    if not pa.types.is_map(lists.type):
        return lists.flatten()
    first, last = lists.offsets[0].as_py(), lists.offsets[-1].as_py()  # Arrow cannot flatten all maps
    return lists.values.slice(first, last - first)


def _too_much(path: Path, ratio: int) -> DataValidationError:
    """The error for a file whose content is too large for its size."""
    return DataValidationError(
        f"{path.name} unpacks to more than {ratio} times its size, which text does not. If the file is right, write it "
        "without compression and without dictionaries."
    )
