"""The rows of a Parquet file, a few at a time.

They stay in Arrow's form in the process that reads the file. `rows_of` makes Python objects of them in the process that
asked for them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.data.reading.lines import MAX_LINE_CHARS, damaged_file, open_bytes
from deal_core.data.rows import Problem, RawRow

_PIECE_ROWS = 4096
_PIECE_BYTES = 2**20
"""Rows that are decoded together, and their bytes if no text is repeated."""
_CELL_BYTES = 8
"""Bytes of a cell beside its content: a list of nulls takes none in Arrow, and many as Python objects."""
_MAX_DEPTH = 4
"""Levels of a type that the recognition of shapes looks at."""
_METADATA = b"huggingface"
"""Key of a Parquet file's metadata under which the library `datasets` describes the columns."""
_NO_PYTHON_VALUE = (ValueError, OverflowError, KeyError)
"""Errors of a text that is not UTF-8, a date beyond Python's range, or an unknown time zone."""


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file to be read page by page. A gzip file is first unpacked to disk, because Parquet needs seeking.

    Raises:
        DataValidationError: The file is damaged.
    """
    with open_bytes(path) as packed, tempfile.TemporaryFile() as unpacked:
        try:
            source: Any = packed
            if not packed.seekable():
                shutil.copyfileobj(packed, unpacked, 2**20)
                unpacked.seek(0)
                source = unpacked
            file = pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False)
            # Arrow decodes a part of the footer when it is asked for it. A footer that contradicts itself ends the
            # process here, before a row of the file is believed.
            for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
                for index in range(group.num_columns):
                    _ = group.column(index).statistics
            yield file
        except MemoryError:
            raise
        except pa.ArrowException as error:
            raise damaged_file(path, error) from error


def read_parquet(path: Path) -> Iterator[pa.RecordBatch | list[RawRow]]:
    """The rows of a file in parts of at most MAX_LINE_CHARS bytes. A row of more is bad, as in a text file."""
    with open_parquet(path) as file:
        number = 1
        schema = without_dictionaries(file.schema_arrow)
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            fitting = _PIECE_BYTES * group.num_rows // max(1, group.total_byte_size)
            size = max(1, min(_PIECE_ROWS, fitting))
            for piece in file.iter_batches(batch_size=size, row_groups=[index], use_threads=False):
                # A part of a dictionary's rows would hold all of its texts.
                for part in _split(piece if piece.schema == schema else piece.cast(schema)):
                    if decoded_size(part) > MAX_LINE_CHARS:
                        yield [_over_long_row(part, number)]
                    else:
                        try:
                            part.validate(full=True)
                        except pa.ArrowInvalid:
                            # A text is not UTF-8, or a cell points outside of its buffer: then this ends the process
                            # here, and not where the rows are wanted.
                            rows_of(part, number, None)
                        yield part
                    number += part.num_rows


def _split(piece: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Split a piece into parts of at most MAX_LINE_CHARS bytes; a single row may be larger."""
    if piece.num_rows <= 1 or decoded_size(piece) <= MAX_LINE_CHARS:
        yield piece
        return
    middle = piece.num_rows // 2
    yield from _split(piece.slice(0, middle))
    yield from _split(piece.slice(middle))


def _over_long_row(row: pa.RecordBatch, number: int) -> RawRow:
    """A row that is too large to become Python objects. Quarantine keeps the size of each cell instead."""
    sizes = {f"bytes of {name}": decoded_size(cell) for name, cell in zip(row.schema.names, row.columns, strict=True)}
    why = f"more than {MAX_LINE_CHARS} bytes in a row"
    return RawRow(number=number, values={}, fault=Problem("over-long text", why, why), whole=partial(dict, sizes))


def decoded_size(cells: Any) -> int:
    """Bytes of an array's or a batch's cells."""
    if isinstance(cells, pa.RecordBatch):
        return sum(map(decoded_size, cells.columns))
    if isinstance(cells, pa.ExtensionArray):
        return decoded_size(cells.storage)
    size = _CELL_BYTES * len(cells)
    if pa.types.is_struct(cells.type):
        return size + sum(map(decoded_size, cells.flatten()))
    if pa.types.is_map(cells.type):  # Arrow cannot flatten all maps
        first, last = cells.offsets[0].as_py(), cells.offsets[-1].as_py()
        return size + decoded_size(cells.values.slice(first, last - first))
    return size + (decoded_size(cells.flatten()) if pa.types.is_nested(cells.type) else int(cells.nbytes))


def without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """The schema with each dictionary's own type in its place."""
    return pa.schema([column.with_type(_without_dictionary(column.type)) for column in schema], schema.metadata)


def _without_dictionary(kind: pa.DataType) -> pa.DataType:
    def plain(column: pa.Field) -> pa.Field:
        return column.with_type(_without_dictionary(column.type))

    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([plain(column) for column in kind])
    if pa.types.is_map(kind):
        return pa.map_(plain(kind.key_field), plain(kind.item_field), keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_field), kind.list_size)
    for is_kind, make in (
        (pa.types.is_list, pa.list_),
        (pa.types.is_large_list, pa.large_list),
        (pa.types.is_list_view, pa.list_view),
        (pa.types.is_large_list_view, pa.large_list_view),
    ):
        if is_kind(kind):
            return make(plain(kind.value_field))
    return kind


def examples(schema: pa.Schema) -> dict[str, Any]:
    """A stand-in of each column's type."""
    return {column.name: _example_of(column.type, _MAX_DEPTH) for column in schema}


def _example_of(kind: pa.DataType, depth: int) -> Any:
    """A value of the type, as deep as the recognition of shapes looks."""
    if depth and (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return [_example_of(kind.value_type, depth - 1)]
    if depth and pa.types.is_struct(kind):
        return {column.name: _example_of(column.type, depth - 1) for column in kind}
    if pa.types.is_boolean(kind):
        return True
    return 0 if pa.types.is_integer(kind) else ""


def class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Names of the classes by column, from the metadata of `datasets`. Metadata of another form have none."""
    try:
        features = json.loads((schema.metadata or {}).get(_METADATA) or b"{}")["info"]["features"]
        columns = dict(features.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    classes = {}
    for column, feature in columns.items():
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names):
            classes[column] = tuple(names)
    return classes


def rows_of(part: pa.RecordBatch, number: int, columns: Collection[str] | None) -> list[RawRow]:
    """The rows of a part.

    Args:
        part: rows that `read_parquet` gave.
        number: of the first row.
        columns: names of the columns that `RawRow.values` holds; None: all. `RawRow.raw` holds all columns.
    """
    names = part.schema.names
    wanted = [index for index, name in enumerate(names) if columns is None or name in columns]

    def whole(place: int) -> dict[str, Any]:
        return _dicts(part.slice(place, 1))[0]

    return [
        RawRow(number + place, values, whole=partial(whole, place) if len(wanted) < len(names) else None)
        for place, values in enumerate(_dicts(part.select(wanted)))
    ]


def _dicts(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The batch's rows; for their cells see `cells_of`."""
    columns, names = map(cells_of, batch.columns), batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def cells_of(column: pa.Array) -> list[Any]:
    """A column's cells as Python objects. A text that is not UTF-8 stays bytes, which the check of the rows finds."""
    try:
        return list(column.to_pylist())
    except _NO_PYTHON_VALUE:
        return [_value(cell) for cell in column]


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
