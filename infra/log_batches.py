"""The batches of a log: Parquet files in the object store, in a folder for each day.

A writer gives each batch a name of its own and never changes it, so servers do not get in each other's way.
`merge_batches` joins the small batches of a day. A row that was stored twice counts once.

All functions raise StoreError if the store does not answer or if a batch is damaged.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import accumulate, groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deal_core.data.schema import is_name
from deal_core.errors import ConfigError, StoreError
from deal_core.safe_text import brief
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore

BATCH_SECONDS = 5.0
"""Time between two batches of a server."""
MERGED_BYTES = 16 << 20
"""Batches of one day are joined up to about this size, which bounds the memory."""
NUM_THREADS = 8
"""Batches that are read or deleted at the same time."""


@dataclass(frozen=True)
class Log:
    """One kind of log of a lineage."""

    name: str
    """Name of its folder in the store."""
    schema: pa.Schema
    """Its columns. `id` is the id of the answer that a row is about."""
    key: str
    """The column that tells rows apart."""
    lineage: str

    def __post_init__(self) -> None:
        if not is_name(self.lineage):  # the folder is made of it, and its batches are deleted
            raise ConfigError(
                f"The lineage is {brief(self.lineage)}; use 1 to 64 letters, digits, '.', '_' or '-', beginning with a "
                "letter or a digit."
            )

    def batches(self, store: ObjectStore, since: date | None = None) -> list[ObjectInfo]:
        """Return the batches, oldest first; with `since`, those written on this day (UTC) or later."""
        infos = [info for info in store.list(keys.log_folder(self.name, self.lineage)) if keys.is_log_batch(info.key)]
        return [info for info in infos if since is None or keys.batch_day(info.key) >= since]


def put_rows(store: ObjectStore, log: Log, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store rows as a new batch. A column that a row does not have is empty."""
    _put(store, keys.log_key(log.name, log.lineage, datetime.now(UTC)), pa.Table.from_pylist(rows, schema=log.schema))


def read_log(
    store: ObjectStore, log: Log, since: date | None = None, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return all rows of a log, each once. `columns` None: all. `since` leaves out batches of earlier days (UTC)."""
    names = log.schema.names if columns is None else [*dict.fromkeys((log.key, *columns))]
    while True:
        infos = log.batches(store, since)
        with suppress(ObjectNotFoundError):  # a batch was joined with others meanwhile; its rows have another place
            table = _read(store, log, [info.key for info in infos], names)
            return table if columns is None else table.select(columns)


def merge_batches(store: ObjectStore, log: Log) -> None:
    """Join the small batches of each day. Nothing may remove rows meanwhile, so the caller holds the lineage.

    A kill leaves rows that are stored twice. They count once, and the next call joins them.
    """
    for _, batches in groupby(log.batches(store), key=lambda info: keys.batch_day(info.key)):
        infos = [*batches]
        ends = accumulate(info.size for info in infos)
        for _, group in groupby(zip(infos, ends, strict=True), key=lambda pair: pair[1] // MERGED_BYTES):
            sources = [info.key for info, _ in group]
            with suppress(ObjectNotFoundError):  # beyond the retention, and removed by a server
                if len(sources) > 1:
                    rows = _read(store, log, sources, log.schema.names)
                    _put(store, keys.log_key(log.name, log.lineage, keys.batch_time(sources[-1])), rows)
                    with ThreadPoolExecutor(NUM_THREADS) as pool:
                        list(pool.map(store.delete, sources))


def remove_rows(store: ObjectStore, log: Log, ids: Collection[str]) -> None:
    """Remove the rows about these answers. The caller holds the lineage. The call can be repeated."""
    merge_batches(store, log)
    wanted = pa.array(sorted(ids), pa.string())
    for info in log.batches(store):
        with suppress(ObjectNotFoundError):  # beyond the retention, and removed by a server
            rows = _get(store, info.key, log, log.schema.names)
            kept = rows.filter(pc.invert(pc.is_in(rows.column("id"), value_set=wanted)))
            if not kept.num_rows:
                store.delete(info.key)
            elif kept.num_rows < rows.num_rows:
                _put(store, info.key, kept)


def beyond_retention(store: ObjectStore, log: Log, *, now: datetime, days: int) -> list[ObjectInfo]:
    """Return the batches whose rows are all older than `days` days."""
    last = now.astimezone(UTC).date() - timedelta(days=days + 1)  # the youngest row of a day may be a day younger
    return [info for info in log.batches(store) if keys.batch_day(info.key) <= last]


def _put(store: ObjectStore, key: str, rows: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    store.put_bytes(key, sink.getvalue())


def _read(store: ObjectStore, log: Log, batches: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Return the rows of batches, each once; raise ObjectNotFoundError if a batch is gone. `columns` has the key."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        tables = pool.map(lambda key: _get(store, key, log, columns), batches)
        table = pa.concat_tables([log.schema.empty_table().select(columns), *tables])
    return table.filter(pa.array(~table.column(log.key).to_pandas().duplicated()))


def _get(store: ObjectStore, key: str, log: Log, columns: Sequence[str]) -> pa.Table:
    content = store.get_bytes(key)
    try:
        # a missing column would be read as empty, and hide rows from deal data delete
        if {*log.schema.names} - {*pq.read_schema(io.BytesIO(content)).names}:
            raise pa.ArrowInvalid("columns are missing")
        return pq.read_table(io.BytesIO(content), columns=columns, schema=log.schema, use_threads=False)
    except (pa.ArrowException, OSError, ValueError):
        raise StoreError(f"{store.uri_of(key)} is no batch of a log; move it elsewhere.") from None
