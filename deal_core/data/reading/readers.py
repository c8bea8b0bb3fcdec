"""Raw rows from CSV, JSON lines and Parquet, plain or gzip, in batches: memory does not grow with the file.

A row that cannot be read becomes a row with a fault. A file that cannot be read (another format than its name says,
damaged, cut off) raises a DataValidationError.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from deal_core.data.reading.csv_records import CsvFile
from deal_core.data.reading.json_rows import read_json
from deal_core.data.reading.parquet_rows import open_parquet, read_parquet
from deal_core.data.rows import RawRow, batches_of
from deal_core.errors import DataValidationError
from deal_core.safe_text import shorten

_SURVEYED_ROWS = 1000
_WRONG_PATH = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)

Kind = Literal["csv", "jsonl", "parquet"]
_KINDS: dict[str, Kind] = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_MAX_DEPTH = 4
"""Levels of a type that the recognition of shapes looks at."""
_METADATA = b"huggingface"
"""Key of a Parquet file's metadata under which the library `datasets` describes the columns."""


@dataclass(frozen=True)
class FileLook:
    """The columns of a file before its rows are read."""

    columns: tuple[str, ...]
    """Names with repetitions; of JSON lines the keys in the first thousand readable rows."""
    examples: Mapping[str, Any] = field(default_factory=dict)
    """One cell of a column: of JSON lines the first that is not empty, of Parquet a stand-in of the column's type. All
    cells of a CSV are texts, so it has only booleans: of columns whose first thousand cells say true, false or nothing.
    """
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes 0, 1, 2, … of a column, from the file's own metadata (`ClassLabel` of `datasets`)."""


def file_kind(path: Path) -> Kind:
    """The file's kind, from its name.

    Raises:
        DataValidationError: The name has an unknown ending, or is not UTF-8.
    """
    if any("\ud800" <= char <= "\udfff" for char in str(path)):
        raise DataValidationError(f"The file name {str(path)[-200:]!r} is not UTF-8; rename the file.")
    if os.path.isdir(path):  # Path.is_dir raises if the name is too long
        raise DataValidationError(f"{path} is a folder; give one file of rows.")
    suffixes = [suffix.casefold() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _KINDS:
        raise DataValidationError(
            f"{path.name} is not named like a file of rows; the name must end in {', '.join(_KINDS)}, or one of these "
            "and .gz."
        )
    return _KINDS[suffixes[-1]]


def look_at(path: Path) -> FileLook:
    """The file's columns, and what their cells look like.

    Raises:
        DataValidationError: The file cannot be read.
    """
    kind = file_kind(path)
    with _whole_file_faults(path):
        if kind == "parquet":
            with open_parquet(path) as file:
                return _look_at_schema(file.schema_arrow)
        if kind == "csv":
            with CsvFile(path) as file:
                return _look_at_csv(file)
        return _look_at_json(path)


def _look_at_json(path: Path) -> FileLook:
    names: dict[str, None] = {}
    examples: dict[str, Any] = {}
    num_readable = 0
    for row, _ in read_json(path):
        names.update(dict.fromkeys(row.values))
        for name, value in row.values.items():
            if value not in (None, "", []):
                examples.setdefault(name, value)
        num_readable += row.fault is None
        if num_readable == _SURVEYED_ROWS:
            break
    return FileLook(tuple(names), examples)


def _look_at_csv(file: CsvFile) -> FileLook:
    booleans, found = {*file.header}, set[str]()
    for row, _ in islice(file.rows(), _SURVEYED_ROWS):
        said = {name: cell.strip().casefold() for name, cell in row.values.items() if name in booleans}
        found.update(name for name, cell in said.items() if cell)
        booleans -= {name for name, cell in said.items() if cell not in ("true", "false", "")}
        if not booleans:
            break
    return FileLook(file.header, dict.fromkeys(booleans & found, True))


def _look_at_schema(schema: pa.Schema) -> FileLook:
    examples = {each.name: _example_of(each.type, _MAX_DEPTH) for each in schema}
    return FileLook(tuple(schema.names), examples, _class_names((schema.metadata or {}).get(_METADATA)))


def _example_of(kind: pa.DataType, depth: int) -> Any:
    """A value of the type, as deep as the recognition of shapes looks."""
    if depth and (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return [_example_of(kind.value_type, depth - 1)]
    if depth and pa.types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return {each.name: _example_of(each.type, depth - 1) for each in fields}
    if pa.types.is_boolean(kind):
        return True
    return 0 if pa.types.is_integer(kind) else ""


def _class_names(metadata: bytes | None) -> dict[str, tuple[str, ...]]:
    """Names by column. Metadata of another form have none."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        columns = dict(features.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found = {}
    for column, feature in columns.items():
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names):
            found[column] = tuple(names)
    return found


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of `read_batches`, one by one, with all columns."""
    for batch in read_batches(path):
        yield from batch


def count_rows(path: Path) -> int:
    """The number of rows of `read_batches`. Of a Parquet file only the footer is read.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    if file_kind(path) != "parquet":
        return sum(map(len, read_batches(path)))
    with _whole_file_faults(path), open_parquet(path) as file:
        return int(file.metadata.num_rows)


def read_batches(path: Path, columns: Collection[str] | None = None) -> Iterator[list[RawRow]]:
    """The file's rows in order, streamed in batches.

    The name of the UTF-8 file ends in .csv, .jsonl, .json or .parquet, each also with .gz. A CSV has a header and may
    use semicolons or tabs. Rows of a Parquet file hold only the wanted `columns`; None: all columns.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    kind = file_kind(path)
    with _whole_file_faults(path):
        if kind == "jsonl":
            yield from batches_of(read_json(path))
        elif kind == "parquet":
            yield from batches_of(read_parquet(path, columns))
        else:
            with CsvFile(path) as file:
                yield from batches_of(file.rows())


@contextmanager
def _whole_file_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataValidationError(f"There is no file {path}; check the path.") from error
    except RecursionError as error:
        raise DataValidationError(f"{path.name} is nested too deeply; write its rows with fewer levels.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataValidationError(
            f"{path.name} is a damaged gzip file or was cut off ({error}); compress or upload it again."
        ) from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno in _WRONG_PATH:
            raise DataValidationError(f"{path} cannot be read ({error.strerror}); check the path.") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataValidationError(
            f"{path.name} cannot be read, it is damaged or was cut off ({shorten(reason, 160)}); write or upload "
            "it again."
        ) from error
