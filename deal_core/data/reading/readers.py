"""Raw rows from CSV, JSON lines and Parquet, plain or gzip, in batches: memory does not grow with the file.

Every file that a user gives is read through this module, and this module reads each in a process of its own: see
`deal_core.data.reading.child`. A row that cannot be read becomes a row with a fault. A file that cannot be read
(another format than its name says, damaged, cut off) raises a DataValidationError, also if it ends the process that
reads it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa

import deal_core
from deal_core.data.reading.batches import ParquetRows, RowBatch, from_json, sent_rows
from deal_core.data.reading.child import HEADER, OUT_OF_MEMORY
from deal_core.data.reading.parsing import FileHead, Kind
from deal_core.data.rows import RawRow
from deal_core.errors import DataValidationError, DealError, ReaderDiedError
from deal_core.safe_text import shorten

_KINDS: dict[str, Kind] = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_PASSED_ON = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL")
"""Variables of the environment that the process needs to start. All others stay here, and secrets with them."""
_SETTINGS = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # the others reserve much more than a file needs
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_LAST_WORDS_BYTES = 4096
_PIPE_BYTES = 2**20


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


def _kind_or_none(path: Path) -> Kind | None:
    try:
        return file_kind(path)
    except DataValidationError:
        return None


def read_head(path: Path) -> FileHead:
    """The file's columns, and what their cells look like.

    Raises:
        DataValidationError: The file cannot be read.
    """
    frames = dict(_read_frames(path, "head"))
    columns, examples, class_names, num_rows = from_json(frames[b"J"])
    names = {column: tuple(classes) for column, classes in class_names.items()}
    schema = pa.ipc.read_schema(pa.py_buffer(frames[b"S"])) if b"S" in frames else None
    return FileHead(tuple(columns), examples, names, num_rows, schema)


def count_rows(paths: Sequence[Path]) -> Iterator[int | None]:
    """Yield the number of rows of each file, as `read_batches` gives them; None: it cannot be read to its end.

    One process counts them all. If a file ends the process, another one goes on after that file. Of a Parquet file only
    the footer is read.
    """
    place = 0
    while place < len(paths):
        try:
            for _, content in _read_frames(paths[place], "count", paths=paths[place:]):
                place += 1
                yield from_json(content)
        except ReaderDiedError:
            place += 1
            yield None


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of `read_batches`, one by one, with all columns."""
    for batch in read_batches(path):
        yield from batch.rows()


def read_batches(path: Path, columns: Collection[str] | None = None) -> Generator[RowBatch]:
    """The rows of a file in order, streamed in batches.

    The name of the UTF-8 file ends in .csv, .jsonl, .json or .parquet, each also with .gz. A CSV has a header and may
    use semicolons or tabs. Rows of a Parquet file hold only the wanted `columns`; None: all columns.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    number, schema = 1, pa.schema([])
    with closing(_read_frames(path, "rows")) as frames:
        for letter, content in frames:
            if letter == b"S":
                schema = pa.ipc.read_schema(pa.py_buffer(content))
                continue
            if letter == b"R":
                rows = sent_rows(content)
                number += len(rows)
                yield rows
                continue
            cells = pa.ipc.read_record_batch(pa.py_buffer(content), schema)
            try:
                cells.validate()
            except pa.ArrowInvalid:
                raise ReaderDiedError(
                    f"{path.name} has cells outside of its data, so it is damaged or was made to do harm; write it "
                    "again."
                ) from None
            yield ParquetRows(cells, number, columns)
            number += cells.num_rows


def _read_frames(
    path: Path, task: Literal["head", "rows", "count"], *, paths: Sequence[Path] = ()
) -> Generator[tuple[bytes, bytes]]:
    """The letters and contents of a file's frames. The process that reads the file ends with the iterator.

    The task "count" is about all `paths`.

    Raises:
        DataValidationError: The process refuses the file.
        ReaderDiedError: The file ended the process.
        DealError: The process cannot be started.
    """
    request = json.dumps([str(path), "" if paths else file_kind(path), task])
    # The path of this package comes first: the process has to be of the same version.
    root = str(Path(deal_core.__file__).parents[1])
    inherited = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    with tempfile.TemporaryFile() as words, tempfile.TemporaryFile() as files:
        files.write(json.dumps([[str(file), _kind_or_none(file)] for file in paths]).encode())
        files.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deal_core.data.reading.child", request],
                stdin=files,
                stdout=subprocess.PIPE,
                stderr=words,
                env={**inherited, **_SETTINGS, "PYTHONPATH": root},
                process_group=0,  # a keyboard interrupt is for this process alone
                pipesize=_PIPE_BYTES,
            )
        except OSError as error:
            raise DealError(f"The process that reads files cannot be started ({error.strerror}); try again.") from error
        with process:
            try:
                yield from _frames_of(process, path, words)
            finally:
                process.kill()


def _frames_of(process: subprocess.Popen[bytes], path: Path, words: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    assert process.stdout is not None
    has_started = False
    while True:
        header = process.stdout.read(HEADER.size)
        letter, length = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0)
        content = process.stdout.read(length)
        if not letter or len(content) < length:
            process.stdout.close()
            raise _death(process.wait(), path, words, has_started)
        if letter == b"E":
            message, code = from_json(content)
            raise DataValidationError(message, code=code)
        if letter == b".":
            return
        if letter == b"+":
            has_started = True
        else:
            yield letter, content


def _death(status: int, path: Path, words: IO[bytes], has_started: bool) -> DealError:
    """The error of a process that ended before the end of its file."""
    size = words.seek(0, os.SEEK_END)
    words.seek(max(0, size - _LAST_WORDS_BYTES))
    lines = words.read().decode("utf-8", "replace").strip().splitlines()
    last = shorten(lines[-1].removeprefix("  what():").strip(), 160) if lines else ""
    if not has_started:
        return DealError(f"The process that reads files does not start ({last or status}); install deal again.")
    if status == OUT_OF_MEMORY or "bad_alloc" in " ".join(lines):
        return ReaderDiedError(
            f"{path.name} needs more memory than a file may take, so it is not read; write it with smaller row groups, "
            "or as JSON lines."
        )
    if status == -signal.SIGXCPU:
        return ReaderDiedError(
            f"{path.name} takes more processor time than a file of its size needs, so it is not read on; write it "
            "again as JSON lines without compression."
        )
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return ReaderDiedError(
        f"{path.name} ended the process that reads it ({how}{': ' if last else ''}{last}), so it is damaged or was "
        "made to do harm; write it again."
    )
