"""The lines of `deal status` about the inbox."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.server.status import _reason, _unusable_files
from infra.store.base import ObjectInfo
from infra.store.local import open_store
from tasks.inbox import InboxState, look


def test_a_failed_arrival_is_told_of_with_what_opens_it_again() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    info = ObjectInfo(key="inbox/bill/may.csv", size=1, etag="1", modified=now - timedelta(days=1))
    away = InboxState().record(info, "failed", "The Hub is away.", now=now)
    assert _reason(away) == "The Hub is away. (Failed 1 times; it is tried again from 2030-01-01 00:01 UTC on.)"
    diverged = InboxState().record(info, "failed", "It diverged; change the settings.", now=now, is_final=True)
    assert _reason(diverged) == "It diverged; change the settings.", "the message says what opens it"


def test_files_that_lie_where_no_watch_looks_are_told_of(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bill/task.yaml", b"test_data: held/out.csv\n")
    for key in ("may.csv", "bill/2026/may.csv", "bill/may.csv", "bill/held/out.csv", "bill/.tmp/x.csv"):
        store.put_bytes(f"inbox/{key}", b"text,label\na,b\n")
    assert [info.key for info in look(store).arrivals] == ["inbox/bill/may.csv"]
    deep, shallow = _unusable_files(store, look(store))
    assert deep.startswith(f"'inbox/bill/2026/may.csv' in {store.uri} is skipped: it is in a subfolder of its task")
    assert deep.endswith("move it to inbox/bill/2026-may.csv.")
    assert shallow.endswith("is skipped: it is not in a task's folder; move it to inbox/TASK/may.csv.")
    for number in range(100):
        store.put_bytes(f"inbox/{number}.csv", b"x")
    assert _unusable_files(store, look(store))[20:] == ["82 more files in the inbox are skipped."]
