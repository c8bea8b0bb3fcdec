"""Raw rows from CSV, JSON lines and Parquet, plain or gzip, in batches: memory does not grow with the file.

A row that cannot be read becomes a row with a fault. A file that cannot be read (another format than its name says,
damaged, cut off) raises a DataValidationError.
"""

from __future__ import annotations

import errno
import gzip
import os
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from deal_core.data.reading.csv_records import CsvFile
from deal_core.data.reading.json_values import begins_like_list, parse_json, read_json_list, why_unreadable
from deal_core.data.reading.lines import MAX_LINE_CHARS, Line, numbered_lines, open_text
from deal_core.data.reading.look import FileLook, look_at_schema
from deal_core.data.reading.parquet_rows import open_parquet, read_parquet
from deal_core.data.rows import BATCH_ROWS, Problem, RawRow, Reason, RowBatch, RowList, grouped, is_utf8
from deal_core.errors import DataValidationError
from deal_core.safe_text import shorten

_SURVEYED_ROWS = 1000
_WRONG_PATH = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)

Kind = Literal["csv", "jsonl", "parquet"]
_KINDS: dict[str, Kind] = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


def file_kind(path: Path) -> Kind:
    """The file's kind, from its name.

    Raises:
        DataValidationError: The name has an unknown ending, or is not UTF-8.
    """
    if not is_utf8(str(path)):
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


def read_columns(path: Path) -> tuple[str, ...]:
    """Names of the file's columns with repetitions; of JSON lines the keys in the first thousand readable rows.

    Raises:
        DataValidationError: The file cannot be read.
    """
    return look_at(path).columns


def look_at(path: Path) -> FileLook:
    """The file's columns, and what their cells look like.

    Raises:
        DataValidationError: The file cannot be read.
    """
    kind = file_kind(path)
    with _whole_file_faults(path):
        if kind == "parquet":
            with open_parquet(path) as file:
                return look_at_schema(file.schema_arrow)
        if kind == "csv":
            with CsvFile(path) as file:
                return FileLook(file.header)
        return _look_at_json(path)


def _look_at_json(path: Path) -> FileLook:
    names: dict[str, None] = {}
    examples: dict[str, Any] = {}
    num_readable = 0
    for row, _ in _read_json_lines(path):
        names.update(dict.fromkeys(row.values))
        for name, value in row.values.items():
            if value not in (None, "", []):
                examples.setdefault(name, value)
        num_readable += row.fault is None
        if num_readable == _SURVEYED_ROWS:
            break
    return FileLook(tuple(names), examples)


def read_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[RawRow]:
    """The file's rows in order, streamed.

    Args:
        path: A UTF-8 file whose name ends in .csv, .jsonl, .json or .parquet, each also with .gz. A CSV has a header
            and may use semicolons or tabs.
        columns: The columns that `values` must hold; None: all columns. Only Parquet uses it.

    Raises:
        DataValidationError: The file cannot be read to its end.

    Example:
        >>> [row.values["label"] for row in read_rows(Path("tickets.csv"))]
    """
    for batch in read_batches(path, columns):
        yield from batch.rows(range(batch.num_rows))


def read_batches(path: Path, columns: Collection[str] | None = None) -> Iterator[RowBatch]:
    """The rows of `read_rows`, in batches."""
    kind = file_kind(path)
    with _whole_file_faults(path):
        if kind == "jsonl":
            yield from map(RowList, grouped(_read_json_lines(path), BATCH_ROWS))
        elif kind == "parquet":
            yield from read_parquet(path, columns)
        else:
            with CsvFile(path) as file:
                yield from map(RowList, grouped(file.rows(), BATCH_ROWS))


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


# --- JSON lines


def _read_json_lines(path: Path) -> Iterator[tuple[RawRow, int]]:
    """The rows, each with its number of characters. A file that begins like a list of objects is read as a list."""
    is_list = False
    with open_text(path, newline="\n") as stream:
        is_first = True
        for line in numbered_lines(stream):
            text = line.text.strip()
            if not text:
                continue
            if is_first and begins_like_list(line.text):
                is_list = True
                break
            is_first = False
            yield _json_row(line, text), len(line.text)
    if is_list:
        yield from read_json_list(path)


def _json_row(line: Line, text: str) -> RawRow:
    if not line.is_whole:
        return _unreadable(line, text, "over-long text", f"more than {MAX_LINE_CHARS} characters in a line")
    try:
        values = parse_json(text)
    except RecursionError:
        return _unreadable(line, text, "malformed line", "nested too deeply")
    except ValueError as error:
        return _unreadable(line, text, "malformed line", shorten(str(error)), why_unreadable(error))
    if not isinstance(values, dict):
        return _unreadable(line, text, "malformed line", "not an object of columns")
    return RawRow(line.number, values, line.number)


def _unreadable(line: Line, text: str, reason: Reason, found: str, why: str | None = None) -> RawRow:
    fault = Problem(reason, f"{found}: {shorten(text)}", why or found)
    return RawRow(line.number, {}, line.number, fault, whole=partial(str, text))
