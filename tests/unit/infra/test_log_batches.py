"""Batches of a log are joined without the loss of a row, and a row that is stored twice counts once."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from deal_core.errors import StoreError
from infra.log_batches import Log, merge_batches, put_rows, read_log, remove_rows
from infra.predictions import forget_answers, prediction_log
from infra.store.keys import batch_day, log_key
from infra.store.local import FileStore

LOG = prediction_log("l")
TODAY = datetime.now(UTC)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def put_on(store: FileStore, day: datetime, *ids: str) -> None:
    """Store a batch as on another day."""
    put_rows(store, LOG, [{"id": each} for each in ids])
    (key,) = (info.key for info in LOG.batches(store) if read_ids(store, info.key) == [*ids])
    content = store.get_bytes(key)
    store.delete(key)
    store.put_bytes(log_key(LOG.name, LOG.lineage, day), content)


def read_ids(store: FileStore, key: str | None = None) -> list[str]:
    if key is None:
        return [row["id"] for row in read_log(store, LOG, columns=["id"]).to_pylist()]
    return [row["id"] for row in pq.read_table(io.BytesIO(store.get_bytes(key))).to_pylist()]


def test_the_batches_of_each_day_are_joined(store: FileStore) -> None:
    yesterday = TODAY - timedelta(days=1)
    for day, ids in ((yesterday, "ab"), (yesterday, "c"), (TODAY, "d"), (TODAY, "e"), (TODAY, "f")):
        put_on(store, day, *ids)
    store.put_bytes("predictions/l/aside/notes.parquet", b"of somebody else")
    merge_batches(store, LOG)
    batches = LOG.batches(store)
    assert [batch_day(info.key) for info in batches] == [yesterday.date(), TODAY.date()]
    assert [{*read_ids(store, info.key)} for info in batches] == [{*"abc"}, {*"def"}]
    merge_batches(store, LOG)
    assert LOG.batches(store) == batches, "what is joined is left alone"
    assert store.exists("predictions/l/aside/notes.parquet")


def test_a_kill_while_batches_are_joined_loses_no_row_and_doubles_none(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on(store, TODAY, "a", "b")
    put_on(store, TODAY, "c")

    class Killed(BaseException):
        """The death of the process."""

    def die(key: str) -> int:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", die)
        with pytest.raises(Killed):
            merge_batches(store, LOG)
    assert len(LOG.batches(store)) == 3 and sorted(read_ids(store)) == ["a", "b", "c"]
    remove_rows(store, LOG, ["b"])
    (batch,) = LOG.batches(store)
    assert sorted(read_ids(store, batch.key)) == ["a", "c"]


def test_a_reader_misses_no_row_though_batches_are_joined_meanwhile(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on(store, TODAY, "a")
    put_on(store, TODAY, "b")
    batches, calls = Log.batches, list[int]()

    def joined_after(log: Log, *arguments: Any) -> Any:
        found = batches(log, *arguments)
        calls.append(len(found))
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(Log, "batches", batches)
                merge_batches(store, LOG)
        return found

    monkeypatch.setattr(Log, "batches", joined_after)
    assert sorted(read_ids(store)) == ["a", "b"] and calls == [2, 1]


def test_a_table_without_the_columns_of_a_log_is_named(store: FileStore) -> None:
    """Read as empty rows, it would hide the answers that deal data delete has to delete."""
    put_on(store, TODAY, "a")
    (info,) = LOG.batches(store)
    other = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(store.get_bytes(info.key))).drop_columns(["input_sha256"]), other)
    for content in (other.getvalue(), b"", b"PAR1 cut"):
        store.put_bytes(info.key, content)
        with pytest.raises(StoreError, match="is no batch of a log; move it elsewhere"):
            forget_answers(store, "l", {"0" * 64})
