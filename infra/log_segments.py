"""The segments of a log: JSON lines on the disk of the process that writes them, then Parquet in the object store.

A process holds the file lock of the segment that it writes. The lock of a segment without a writer is free, also after
a kill. `ship` moves such segments into the store. A segment that is shipped twice is stored once, under its name.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deal_core.data.schema import is_name
from deal_core.errors import ConfigError, StoreError
from deal_core.safe_text import brief
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore

logger = logging.getLogger(__name__)

SEGMENT_SECONDS = 900.0
SEGMENT_ROWS = 50_000
"""A segment that is older, or has more rows, is closed."""
CLOSE_FILE = "close"
"""A file in a log's folder. After its time has changed, writers close their segments."""
CLOSE_SECONDS = 30.0
"""Time for writers to close their segments."""
WRITE_SECONDS = 0.5
"""Time after which a server writes the rows that wait."""
NUM_READERS = 8
"""Segments that are read from the store at the same time."""


@dataclass(frozen=True)
class Log:
    """One kind of log of a lineage, in a home folder and in a store."""

    name: str
    """Name of its folder in both places."""
    schema: pa.Schema
    """Its columns. `id` is the id of the answer that a row is about."""
    key: str
    """The column that tells rows apart."""
    lineage: str
    home: Path

    def __post_init__(self) -> None:
        if not is_name(self.lineage):  # the folder is made of it, and its segments are moved and deleted
            raise ConfigError(
                f"The lineage is {brief(self.lineage)}; use 1 to 64 letters, digits, '.', '_' or '-', beginning with a "
                "letter or a digit."
            )

    @property
    def folder(self) -> Path:
        """The folder of the segments that are not shipped."""
        return self.home / self.name / self.lineage

    def segments(self) -> list[Path]:
        """Return the segments on this machine, oldest first."""
        return sorted(self.folder.glob("[0-9]*.jsonl"))

    def unnamed(self) -> list[Path]:
        """Return the empty segments that have no name yet. Their writer has just opened them, or was killed then."""
        return sorted(self.folder.glob(".*.jsonl"))

    def stored(self, store: ObjectStore, since: date | None = None) -> list[ObjectInfo]:
        """Return the segments in the store, oldest first; with `since`, those opened on this day or later."""
        found = [info for info in store.list(keys.log_folder(self.name, self.lineage)) if info.key.endswith(".parquet")]
        return [info for info in found if since is None or keys.segment_day(keys.file_name(info.key)) >= since]


class SegmentWriter:
    """Writes the rows of one log as JSON lines, into one segment after another."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._file: FileIO | None = None
        self._opened = 0.0
        self._num_rows = 0
        self._close_stamp = 0
        self._is_failing = False

    def write(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows and force them to the disk. Return the number of rows that were lost.

        After an error the segment ends. A half-written line stays, and readers skip it. The first of several errors is
        logged.
        """
        data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        written = 0
        try:
            file = self._file or self._open()
            while written < len(data):
                written += file.write(data[written:]) or 0
            os.fsync(file.fileno())
        except OSError as error:
            if not self._is_failing:
                logger.warning("Rows of %s are not written (%s); they are lost.", self._log.folder, error.strerror)
            self._is_failing = True
            self.close()
            return len(rows) - data[:written].count(b"\n")
        self._num_rows += len(rows)
        self._is_failing = False
        return 0

    def close_if_due(self) -> None:
        """Close the segment if it is old or large, or if `ship_all` has asked for it."""
        is_old = time.monotonic() - self._opened > SEGMENT_SECONDS
        if self._file is not None and (
            is_old or self._num_rows >= SEGMENT_ROWS or _close_stamp(self._log) != self._close_stamp
        ):
            self.close()

    def close(self) -> None:
        """Close the segment. The next row opens another one."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None

    def _open(self) -> FileIO:
        self._log.folder.mkdir(parents=True, exist_ok=True)
        path = self._log.folder / f"{new_segment()}.jsonl"
        hidden = path.with_name(f".{path.name}")  # it gets its name when it is locked, so `ship` never takes it before
        file = FileIO(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600), "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            close_stamp = _close_stamp(self._log)  # before the rename, after which `ship_all` may ask to close it
            os.rename(hidden, path)
        except OSError:
            file.close()
            hidden.unlink(missing_ok=True)
            raise
        self._file, self._opened, self._num_rows = file, time.monotonic(), 0
        self._close_stamp = close_stamp
        return file


def new_segment() -> str:
    """Return a new segment's name. Names sort by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}"


def ship(store: ObjectStore, log: Log) -> int:
    """Move the segments without a writer into the store; return their number.

    Raises:
        StoreError: The store does not answer, or a segment is damaged or belongs to another user.
    """
    num_shipped = 0
    for path in log.segments():
        with _usable(path), _locked(path) as is_ours:
            if is_ours:
                put_table(store, log, path.stem, read_segment(path, log.schema))
                path.unlink()
                num_shipped += 1
    return num_shipped


def ship_all(store: ObjectStore, log: Log) -> None:
    """Let the writers on this machine close their segments, and move all segments into the store.

    Raises:
        StoreError: The store does not answer, a segment is damaged, or a writer has not closed its segment in time.
    """
    waiting = log.segments()
    if not waiting:
        return
    with _usable(log.folder / CLOSE_FILE) as path:
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    deadline = time.monotonic() + CLOSE_SECONDS
    while True:
        ship(store, log)
        waiting = [path for path in waiting if path.exists()]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise StoreError(f"A process still writes {waiting[0]}; stop its deal serve, and repeat the command.")
        time.sleep(0.1)


def put_table(store: ObjectStore, log: Log, segment: str, table: pa.Table) -> None:
    """Store a segment. A segment without rows is deleted."""
    key = keys.log_key(log.name, log.lineage, segment)
    if not table.num_rows:
        store.delete(key)
        return
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    store.put_bytes(key, sink.getvalue())


def read_segment(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a segment on this machine. A line that was not written to its end is skipped.

    Raises:
        StoreError: The segment has a row of another form, or belongs to another user.
        FileNotFoundError: The segment was moved meanwhile.
    """
    with _usable(path):
        content = path.read_bytes()
    *lines, _ = content.split(b"\n")  # after the last line end stands nothing, or a half-written line
    rows = []
    for line in lines:
        with suppress(ValueError):  # a power cut may leave such lines
            rows.append(json.loads(line))
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, AttributeError, TypeError):
        raise StoreError(f"{path} has a row of another form; move the file elsewhere.") from None


def get_table(store: ObjectStore, key: str, log: Log, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a segment in the store; a segment that was deleted meanwhile has no rows. `columns` are read; None: all.

    A column that the segment does not have, because an earlier release wrote it, is empty.

    Raises:
        StoreError: The store does not answer, or the segment is damaged.
    """
    try:
        return pq.read_table(io.BytesIO(store.get_bytes(key)), columns=columns, schema=log.schema)
    except ObjectNotFoundError:
        return log.schema.empty_table().select(columns or log.schema.names)
    except pa.ArrowException:
        raise StoreError(f"{store.uri_of(key)} is no segment of a log; move it elsewhere.") from None


def read_log(
    store: ObjectStore, log: Log, since: date | None = None, *, columns: Sequence[str] | None = None, ships: bool = True
) -> pa.Table:
    """Read all rows of a log, in the store and on this machine. A row counts once.

    Segments without a writer are moved into the store first, unless `ships` is False. `since` leaves out segments of
    earlier days. The result has `columns`; None: all.
    """
    read = log.schema.names if columns is None else [*dict.fromkeys((log.key, *columns))]
    try:
        if ships:
            ship(store, log)
    except StoreError as error:  # what is here can be read all the same
        logger.warning("%s", error)
    tables = []
    for path in log.segments():  # before the store is read, so that a segment that moves meanwhile is not missed
        with suppress(FileNotFoundError):
            tables.append(read_segment(path, log.schema).select(read))
    with ThreadPoolExecutor(NUM_READERS) as pool:
        infos = log.stored(store, since)
        tables += pool.map(lambda info: get_table(store, info.key, log, read), infos)
    table = pa.concat_tables([log.schema.empty_table().select(read), *tables])
    places: dict[str, int] = {}
    for place, name in enumerate(table.column(log.key).to_pylist()):
        places.setdefault(name, place)
    table = table if len(places) == table.num_rows else table.take(list(places.values()))
    return table if columns is None else table.select(columns)


def remove_rows(store: ObjectStore, log: Log, ids: Collection[str]) -> None:
    """Remove the rows about these answers, in the store and on this machine. Each step can be repeated.

    Raises:
        StoreError: The store does not answer, or a writer does not close its segment.
    """
    ship_all(store, log)
    wanted = pa.array(sorted(ids), pa.string())
    for info in log.stored(store):
        table = get_table(store, info.key, log)
        kept = table.filter(pc.invert(pc.is_in(table.column("id"), value_set=wanted)))
        if kept.num_rows < table.num_rows:
            put_table(store, log, keys.file_name(info.key).removesuffix(".parquet"), kept)


def _close_stamp(log: Log) -> int:
    try:
        return (log.folder / CLOSE_FILE).stat().st_mtime_ns
    except OSError:
        return 0


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a segment. False: a process writes it, or it is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield False
        return
    with file:
        is_free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        yield is_free and path.exists()  # another process may have shipped it before this one got the lock


@contextmanager
def _usable(path: Path) -> Iterator[Path]:
    """Report that a file of a log cannot be used. A file that is gone is not reported.

    Raises:
        StoreError: Another user owns the file, say.
    """
    try:
        yield path
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path} cannot be used ({error.strerror}); give the command as the user who runs deal serve."
        ) from None
