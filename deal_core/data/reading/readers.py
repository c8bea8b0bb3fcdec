"""Raw rows from CSV, JSON lines and Parquet, plain or gzip, in batches: memory does not grow with the file.

Every file that a user gives is read through this module, and this module reads each in a process of its own. A row that
cannot be read becomes a row with a fault. A file that cannot be read (another format than its name says, damaged, cut
off) raises a DataValidationError, also if it ends the process that reads it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from deal_core.data.reading.frames import from_json
from deal_core.data.reading.parquet_rows import in_bytes, rows_of
from deal_core.data.reading.parsing import FileLook, Kind
from deal_core.data.reading.process import read_frames
from deal_core.data.rows import Problem, RawRow, Reason, batches_of
from deal_core.errors import DataValidationError, ReaderDiedError

_KINDS: dict[str, Kind] = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_REASONS = frozenset(get_args(Reason))


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
    frames = {frame.letter: frame.content for frame in read_frames(path, file_kind(path), "look")}
    with _understanding(path):
        columns, examples, class_names, num_rows = from_json(frames[b"L"])
        return FileLook(
            _texts(columns),
            _of_type(dict, examples),
            {name: _texts(names) for name, names in class_names.items()},
            None if num_rows is None else _of_type(int, num_rows),
            pa.ipc.read_schema(pa.py_buffer(frames[b"S"])) if b"S" in frames else None,
        )


def most_rows(path: Path) -> int:
    """A number of rows that the file does not exceed: of Parquet its number of rows, of a text that of its lines.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    frames = {frame.letter: frame.content for frame in read_frames(path, file_kind(path), "most")}
    with _understanding(path):
        return int(_of_type(int, from_json(frames[b"N"])))


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of `read_batches`, one by one, with all columns."""
    for batch in read_batches(path):
        yield from batch


def read_batches(path: Path, columns: Collection[str] | None = None) -> Iterator[list[RawRow]]:
    """The file's rows in order, streamed in batches.

    The name of the UTF-8 file ends in .csv, .jsonl, .json or .parquet, each also with .gz. A CSV has a header and may
    use semicolons or tabs. Rows of a Parquet file hold only the wanted `columns`; None: all columns.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    kind = file_kind(path)
    if kind == "parquet":
        yield from batches_of(_parquet_rows(path, columns))
        return
    with closing(read_frames(path, kind, "rows")) as frames:
        for frame in frames:
            yield _rows_of_json(path, frame.content)


def _parquet_rows(path: Path, columns: Collection[str] | None) -> Iterator[tuple[RawRow, int]]:
    """The rows of a Parquet file, each with its bytes."""
    number, schema = 1, pa.schema([])
    with closing(read_frames(path, "parquet", "rows")) as frames:
        for letter, content in frames:
            if letter == b"S":
                with _understanding(path):
                    schema = pa.ipc.read_schema(pa.py_buffer(content))
            elif letter == b"R":
                rows = _rows_of_json(path, content)
                yield from ((row, 0) for row in rows)
                number += len(rows)
            else:
                with _understanding(path):
                    part = _checked(content, schema)
                yield from rows_of(part, number, columns)
                number += part.num_rows


def _checked(content: bytes, schema: pa.Schema) -> pa.RecordBatch:
    """The rows of a frame, whose every offset lies within its buffers. What a cell means is checked as a row's."""
    buffer = pa.py_buffer(content)
    pa.ipc.read_record_batch(buffer, in_bytes(schema)).validate(full=True)
    return pa.ipc.read_record_batch(buffer, schema)


def _rows_of_json(path: Path, content: bytes) -> list[RawRow]:
    with _understanding(path):
        return [_row(*values) for values in from_json(content)]


def _row(number: Any, values: Any, line: Any, fault: Any, raw: Any) -> RawRow:
    _of_type(int, number), _of_type(dict, values), _of_type(int, line or 0)
    if fault is None:
        return RawRow(number, values, line)
    reason, value, why = _texts(fault)
    if reason not in _REASONS:
        raise ValueError(reason)
    fault = Problem(reason, value, why)  # type: ignore[arg-type]  # a text that is one of the reasons, as was checked
    return RawRow(number, values, line, fault, whole=partial(_same, raw))


def _same(value: Any) -> Any:
    return value


def _of_type(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(kind.__name__)
    return value


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_of_type(str, value) for value in _of_type(list, values))


@contextmanager
def _understanding(path: Path) -> Iterator[None]:
    """Refuse a file whose reader gives an answer of another form: the file may have changed what the process does."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, pa.ArrowException, OSError) as error:
        raise ReaderDiedError(
            f"{path.name} confused the process that reads it ({type(error).__name__}), so it is damaged or was made to "
            "do harm; write it again."
        ) from error
