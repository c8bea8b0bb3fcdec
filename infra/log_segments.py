"""The segments of a log: JSON lines on the disk of the process that writes them, then Parquet in the object store.

Who writes a segment or moves it into the store locks the file for that moment. A writer whose segment was moved begins
another one. A segment that is moved twice, because of a kill, is stored once, under its name.

All functions raise StoreError if the store does not answer, or if a segment is damaged or belongs to another user.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from io import FileIO
from pathlib import Path
from typing import Any, Literal

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
"""A segment that is older, or has more rows, is not written any more."""
TIME_FORM = "%Y%m%dT%H%M%S"
"""Form of the time (UTC) that a segment's name begins with."""
SEGMENT_NAME = re.compile(r"\d{8}T.*\.parquet")
TAKEN = (BlockingIOError, FileNotFoundError)
"""Errors of a segment that another process uses or has shipped."""
WRITE_SECONDS = 0.5
"""Time after which a server writes the rows that wait."""
NUM_READERS = 8
"""Segments that are read from the store at the same time."""


class LocalSegmentError(StoreError):
    """A segment on this machine cannot be used."""


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

    def stored(self, store: ObjectStore, since: date | None = None) -> list[ObjectInfo]:
        """Return the segments in the store, oldest first; with `since`, those opened on this day or later."""
        listing = store.list(keys.log_folder(self.name, self.lineage))
        found = [info for info in listing if SEGMENT_NAME.fullmatch(keys.file_name(info.key))]
        return [info for info in found if since is None or keys.segment_day(keys.file_name(info.key)) >= since]


class SegmentWriter:
    """Writes the rows of one log as JSON lines, into one segment after another."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._path: Path | None = None
        """The present segment."""
        self._began = 0.0
        self._num_rows = 0
        self._is_failing = False

    def write(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows and force them to the disk. Return the number of rows that were lost.

        After an error the segment ends. A half-written line stays, and readers skip it. The first of several errors is
        logged.
        """
        data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        written = 0
        try:
            with self._open() as file:
                while written < len(data):
                    written += file.write(data[written:]) or 0
                os.fsync(file.fileno())
        except OSError as error:
            if not self._is_failing:
                logger.warning("Rows of %s are not written (%s); they are lost.", self._log.folder, error.strerror)
            self._is_failing, self._path = True, None
            return len(rows) - data[:written].count(b"\n")
        self._num_rows += len(rows)
        self._is_failing = False
        return 0

    def _open(self) -> FileIO:
        """Open and lock the present segment, or a new one if it is old, large or shipped."""
        is_old = time.monotonic() - self._began > SEGMENT_SECONDS
        if self._path is not None and not is_old and self._num_rows < SEGMENT_ROWS:
            with suppress(*TAKEN):
                file = _locked(self._path, "r+b")
                file.seek(0, os.SEEK_END)
                return file
        while True:
            self._log.folder.mkdir(parents=True, exist_ok=True)
            self._path = self._log.folder / f"{new_segment()}.jsonl"
            self._began, self._num_rows = time.monotonic(), 0
            with suppress(*TAKEN):  # by `ship`, in the moment before it was locked
                return _locked(self._path, "xb")


def new_segment() -> str:
    """Return a new segment's name. Names sort by time."""
    return f"{datetime.now(UTC):{TIME_FORM}}-{uuid.uuid4().hex[:12]}"


def ship(store: ObjectStore, log: Log, *, everything: bool = False) -> int:
    """Move the segments of this machine that are no longer written, or all, into the store; return their number.

    The writer of a segment that was moved goes on with a new one. A segment that cannot be used stays, and the others
    are moved; the first such error is raised in the end.
    """
    num_shipped, errors = 0, list[LocalSegmentError]()
    finished = f"{datetime.now(UTC) - timedelta(seconds=SEGMENT_SECONDS):{TIME_FORM}}"
    for path in log.segments():
        if everything or path.name < finished:
            try:
                with _usable(path), suppress(*TAKEN), _locked(path, "rb", waits=True):
                    put_table(store, log, path.stem, read_segment(path, log.schema))
                    path.unlink()
                    num_shipped += 1
            except LocalSegmentError as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return num_shipped


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
    """Read a segment on this machine; raise FileNotFoundError if it was moved. A damaged line is skipped."""
    with _usable(path):
        content = path.read_bytes()
    *lines, _ = content.split(b"\n")  # after the last line end stands nothing, or a half-written line
    rows = []
    for line in lines:
        with suppress(ValueError):  # a power cut may leave such lines
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, AttributeError, TypeError):
        raise LocalSegmentError(f"{path} has a row of another form; move the file elsewhere.") from None


def get_table(store: ObjectStore, key: str, log: Log, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a segment in the store; a segment that was deleted meanwhile has no rows. `columns` are read; None: all."""
    try:
        content = store.get_bytes(key)
        if {*log.schema.names} - {*pq.read_schema(io.BytesIO(content)).names}:
            raise pa.ArrowInvalid("columns are missing")
        return pq.read_table(io.BytesIO(content), columns=columns, schema=log.schema, use_threads=False)
    except ObjectNotFoundError:
        return log.schema.empty_table().select(columns or log.schema.names)
    except pa.ArrowException:
        raise StoreError(f"{store.uri_of(key)} is no segment of a log; move it elsewhere.") from None


def read_log(
    store: ObjectStore, log: Log, since: date | None = None, *, columns: Sequence[str] | None = None, ships: bool = True
) -> pa.Table:
    """Read all rows of a log, in the store and on this machine. A row counts once.

    Segments that are no longer written are moved into the store first, unless `ships` is False. `since` leaves out
    segments of earlier days. The result has `columns`; None: all.
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
    table = table.filter(pa.array(~table.column(log.key).to_pandas().duplicated()))
    return table if columns is None else table.select(columns)


def beyond_retention(store: ObjectStore, log: Log, *, now: datetime, days: int) -> tuple[list[ObjectInfo], list[Path]]:
    """Return the segments, in the store and on this machine, whose rows are all older than `days` days.

    A segment on this machine that was never moved into the store counts too. Its writer is gone, as a segment is
    written for minutes.
    """
    last = now.astimezone(UTC).date() - timedelta(days=days + 1)  # the youngest row of a day may be a day younger
    stored = [info for info in log.stored(store) if keys.segment_day(keys.file_name(info.key)) <= last]
    return stored, [path for path in log.segments() if keys.segment_day(path.name) <= last]


def remove_beyond_retention(store: ObjectStore, log: Log, *, days: int) -> None:
    """Remove the segments whose rows are all older than `days` days."""
    stored, local = beyond_retention(store, log, now=datetime.now(UTC), days=days)
    for info in stored:
        store.delete(info.key)
    for path in local:
        with _usable(path), suppress(FileNotFoundError):
            path.unlink()


def remove_rows(store: ObjectStore, log: Log, ids: Collection[str]) -> None:
    """Remove the rows about these answers, in the store and on this machine. Each step can be repeated."""
    ship(store, log, everything=True)
    wanted = pa.array(sorted(ids), pa.string())
    for info in log.stored(store):
        table = get_table(store, info.key, log)
        kept = table.filter(pc.invert(pc.is_in(table.column("id"), value_set=wanted)))
        if kept.num_rows < table.num_rows:
            put_table(store, log, keys.file_name(info.key).removesuffix(".parquet"), kept)


def _locked(path: Path, mode: Literal["rb", "r+b", "xb"], *, waits: bool = False) -> FileIO:
    """Open a segment and lock it, until it is closed; raise one of TAKEN if that is not possible."""
    file = open(path, mode, buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "It was shipped", str(path))
    except OSError:
        file.close()
        raise
    return file


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Raise LocalSegmentError if a file of a log cannot be used, for example because another user owns it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LocalSegmentError(
            f"{path} cannot be used ({error.strerror}); give the command as the user who runs deal serve."
        ) from None
