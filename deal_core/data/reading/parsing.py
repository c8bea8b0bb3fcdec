"""The rows of CSV, JSON lines and Parquet, plain or gzip, read in this process.

`deal_core.data.reading.readers` calls it in a process of its own, because a hostile file can end the process that reads
it. Arrow is imported for Parquet alone: a process that reads a text starts in half of the time without it.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deal_core.data.reading.csv_records import CsvFile
from deal_core.data.reading.json_rows import read_json
from deal_core.data.reading.lines import damaged_file
from deal_core.data.rows import RawRow
from deal_core.errors import DataValidationError
from deal_core.regular_file import WRONG_PATH
from deal_core.safe_text import shorten

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["csv", "jsonl", "parquet"]
FREE_ROWS = 100_000
"""Number of rows that a file may always have. More rows need two bytes each: repeated rows are bad rows, and different
rows take more space."""
BATCH_ROWS = 4096
BATCH_CHARS = 2**19
"""Most rows and characters of a batch. A single row may be larger."""
_SURVEYED_ROWS = 1000


@dataclass(frozen=True)
class FileHead:
    """The columns of a file before its rows are read."""

    columns: tuple[str, ...]
    """Names with repetitions; of JSON lines the keys in the first thousand readable rows."""
    examples: Mapping[str, Any] = field(default_factory=dict)
    """One cell of a column: of JSON lines the first that is not empty, of Parquet a stand-in of the column's type. All
    cells of a CSV are texts, so it has only booleans: of columns whose first thousand cells say true, false or nothing.
    """
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes 0, 1, 2, … of a column, from the file's own metadata (`ClassLabel` of `datasets`)."""
    num_rows: int | None = None
    """Number of rows that the footer of a Parquet file names."""
    schema: pa.Schema | None = None
    """The columns of a Parquet file with their types."""


def head(path: Path, kind: Kind) -> FileHead:
    """The columns of a file, and what their cells look like.

    Raises:
        DataValidationError: The file cannot be read.
    """
    with whole_file_faults(path):
        if kind == "parquet":
            from deal_core.data.reading.parquet_rows import class_names, examples, open_parquet

            with open_parquet(path) as file:
                schema = file.schema_arrow
                names = class_names(schema)
                return FileHead(tuple(schema.names), examples(schema), names, file.metadata.num_rows, schema)
        if kind == "csv":
            return _head_of_csv(path)
        return _head_of_json(path)


def _head_of_json(path: Path) -> FileHead:
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
    return FileHead(tuple(names), examples)


def _head_of_csv(path: Path) -> FileHead:
    with CsvFile(path) as file:
        booleans, not_empty = {*file.header}, set[str]()
        for row, _ in islice(file.rows(), _SURVEYED_ROWS):
            cells = {name: cell.strip().casefold() for name, cell in row.values.items() if name in booleans}
            not_empty.update(name for name, cell in cells.items() if cell)
            booleans -= {name for name, cell in cells.items() if cell not in ("true", "false", "")}
            if not booleans:
                break
        return FileHead(file.header, dict.fromkeys(booleans & not_empty, True))


def parse(path: Path, kind: Kind) -> Iterator[list[RawRow] | pa.RecordBatch]:
    """The rows of a file in order, a batch at a time; rows of Parquet stay in Arrow's form.

    Raises:
        DataValidationError: The file cannot be read to its end, or has more rows than its size has room for.
    """
    with whole_file_faults(path):
        # A packed file of a few bytes can hold rows without end, and they would keep busy whoever takes them.
        size = path.stat().st_size
        most, num_rows = max(FREE_ROWS, size // 2), 0
        for batch in _batches(path, kind):
            num_rows += len(batch)
            if num_rows > most:
                raise DataValidationError(
                    f"{path.name} has more than {most:,} rows in {size:,} bytes, and different texts do not pack so "
                    "small. If the file is right, land it as unpacked JSON lines."
                )
            yield batch


def _batches(path: Path, kind: Kind) -> Iterator[list[RawRow] | pa.RecordBatch]:
    if kind == "parquet":
        from deal_core.data.reading.parquet_rows import read_parquet

        yield from read_parquet(path)
    elif kind == "csv":
        with CsvFile(path) as file:
            yield from batches_of(file.rows())
    else:
        yield from batches_of(read_json(path))


def batches_of(rows: Iterable[tuple[RawRow, int]]) -> Iterator[list[RawRow]]:
    """Group rows, each with its number of characters, into batches of at most BATCH_ROWS and BATCH_CHARS.

    If reading a row fails, the earlier rows are yielded before the error is raised.
    """
    batch: list[RawRow] = []
    num_chars = 0
    try:
        for row, size in rows:
            if batch and (len(batch) == BATCH_ROWS or num_chars + size > BATCH_CHARS):
                yield batch
                batch, num_chars = [], 0
            batch.append(row)
            num_chars += size
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


@contextmanager
def whole_file_faults(path: Path) -> Iterator[None]:
    """Turn the errors of a file that cannot be read into one sentence about it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataValidationError(f"There is no file {path}; check the path.") from error
    except UnicodeDecodeError as error:  # cells of that kind stay bytes, so it is a name in the footer
        name = shorten(error.object.decode(errors="backslashreplace"), 40)
        raise DataValidationError(
            f"{path.name} has a column whose name is not UTF-8 ({name}); rename the column."
        ) from error
    except RecursionError as error:
        raise DataValidationError(f"{path.name} is nested too deeply; write its rows with fewer levels.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataValidationError(
            f"{path.name} is a damaged gzip file or was cut off ({error}); compress or upload it again."
        ) from error
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in WRONG_PATH:
            raise DataValidationError(f"{path} cannot be read ({error.strerror}); check the path.") from error
        raise damaged_file(path, error) from error
