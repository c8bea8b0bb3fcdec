"""The arrivals of a lineage in a folder store: rows are counted once, ends are noted, and copies are recognised."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import tasks.arrivals
from deal_core.errors import StoreError
from infra.lineage_state import LineageState, note_ended, read_ended, read_state, update
from infra.store.base import ObjectStore
from infra.store.local import FileStore
from infra.store.opening import store_at
from tasks.arrival_queue import Result, claim
from tasks.arrivals import end_try, sense_inbox
from tasks.inbox import look
from tasks.lineage.settings import WatchedLineage
from tasks.spec import parse
from tests.arriving import NOW

ROW = b'{"text": "a", "label": "b"}\n'


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    return FileStore(tmp_path / "store")


def land(store: FileStore, name: str, num_rows: int) -> None:
    path = store.path_of(f"inbox/{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ROW * num_rows)
    os.utime(path, (1_700_000_000, 1_700_000_000))


def sensed(store: ObjectStore, *, is_reader: bool = False, **policy: Any) -> LineageState:
    lineage = parse(WatchedLineage, {"lineage": "l", "retrain": policy}, "test")
    return sense_inbox(store, lineage, look(store), 0, is_reader=is_reader)


def ended(store: ObjectStore, outcome: str, **facts: Any) -> None:
    """Let a try of what is due end."""
    policy = WatchedLineage().retrain
    state = update(store, "l", lambda state: claim(state, policy, NOW, lambda _: 0.0, "one"))
    assert state.claimed is not None
    end_try(store, "l", state.claimed, Result(outcome, "because", **facts), look(store))


def rows(state: LineageState) -> dict[str, int | None]:
    return {key.removeprefix("inbox/"): note.num_rows for key, note in state.arrivals.items()}


@pytest.mark.parametrize("is_reader", [False, True])
def test_rows_are_counted_in_groups_and_once_until_a_file_changes(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, is_reader: bool
) -> None:
    counted: list[int] = []
    count = tasks.arrivals.count_rows
    monkeypatch.setattr(tasks.arrivals, "count_rows", lambda paths: counted.append(len(paths)) or count(paths))
    monkeypatch.setattr(tasks.arrivals, "COUNTED_TOGETHER", 2)
    assert sensed(store, is_reader=is_reader).arrivals == {} and not store.exists("lineages/l.state.json")
    for number in range(3):
        land(store, f"b/{number}.jsonl", number + 1)
    assert rows(sensed(store)) == {"b/0.jsonl": None, "b/1.jsonl": None, "b/2.jsonl": None}, "nothing waits for rows"
    for _ in range(2):
        found = rows(sensed(store, is_reader=is_reader, min_rows=9))
        assert found == {"b/0.jsonl": 1, "b/1.jsonl": 2, "b/2.jsonl": 3}
    assert counted == [2, 1]
    assert {note.landed.year for note in read_state(store, "l").arrivals.values()} != {2023}, "not the file's own time"
    land(store, "b/1.jsonl", 4)
    assert rows(sensed(store, is_reader=is_reader, min_rows=9))["b/1.jsonl"] == 4 and counted == [2, 1, 1]


def test_few_large_files_are_counted_together(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a bucket lie on this machine until they are counted."""
    counted: list[int] = []
    count = tasks.arrivals.count_rows
    monkeypatch.setattr(tasks.arrivals, "count_rows", lambda paths: counted.append(len(paths)) or count(paths))
    monkeypatch.setattr(tasks.arrivals, "COUNTED_BYTES", 2 * len(ROW))
    for number in range(5):
        land(store, f"b/{number}.jsonl", 1)
    assert set(rows(sensed(store, min_rows=9)).values()) == {1} and counted == [2, 2, 1]


def test_no_arrival_is_complete_because_a_reader_has_counted_it(store: FileStore) -> None:
    land(store, "b/1.jsonl", 2)
    os.utime(store.path_of("inbox/b/1.jsonl"))
    assert rows(sensed(store, is_reader=True, min_rows=9)) == {"b/1.jsonl": 2}
    (note,) = read_state(store, "l").arrivals.values()
    assert (note.state, note.num_rows) == ("landed", 2)


def test_an_arrival_that_ends_during_a_look_is_over(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    land(store, "b/1.jsonl", 1)
    sensed(store)

    def update_after_its_end(*given: Any) -> LineageState:
        monkeypatch.setattr(tasks.arrivals, "update", update)
        ended(store, "promoted", version="1")
        return update(*given)

    monkeypatch.setattr(tasks.arrivals, "update", update_after_its_end)
    assert sensed(store) == LineageState() and read_ended(store, "l")


def test_what_was_counted_before_an_interruption_is_kept(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.arrivals, "COUNTED_TOGETHER", 1)
    for name in ("b/0.jsonl", "b/1.jsonl"):
        land(store, name, 2)
    count, calls = tasks.arrivals.count_rows, list[int]()

    def interrupted(paths: list[Path]) -> Any:
        calls.append(len(paths))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return count(paths)

    monkeypatch.setattr(tasks.arrivals, "count_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sensed(store, min_rows=9)
    assert sorted(rows(read_state(store, "l")).values(), key=str) == [2, None]


def test_files_that_cannot_be_counted_have_no_rows_and_a_folder_has_those_of_all_its_files(store: FileStore) -> None:
    for name in ("part-1.jsonl", "part-2.jsonl"):
        land(store, f"b/may/{name}", 2)
    land(store, "b/half/part-1.jsonl", 2)
    store.put_bytes("inbox/b/half/part-2.parquet", b"x")
    for name in ("may", "half"):
        store.put_bytes(f"inbox/b/{name}/_SUCCESS", b"")
    store.put_bytes("inbox/b/notes.txt", b"x")
    land(store, "b/empty.jsonl", 0)
    assert rows(sensed(store, min_rows=9)) == {"b/may": 4, "b/half": 0, "b/notes.txt": 0, "b/empty.jsonl": 0}


def test_a_reader_that_may_not_write_counts_all_the_same(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    land(store, "b/1.jsonl", 2)

    def refuse(*_: object, **__: object) -> None:
        raise StoreError("access denied")

    monkeypatch.setattr(FileStore, "put_bytes", refuse)
    assert rows(sensed(store, is_reader=True, min_rows=9)) == {"b/1.jsonl": 2}


def test_an_end_is_noted_and_goes_with_its_file_unless_a_version_came_of_it(store: FileStore) -> None:
    for name in ("b/1.jsonl", "b/2.jsonl"):
        land(store, name, 1)
    sensed(store)
    ended(store, "promoted", version="1")
    ended(store, "refused")
    assert {key: end.outcome for key, end in read_ended(store, "l").items()} == {
        "inbox/b/1.jsonl": "promoted",
        "inbox/b/2.jsonl": "refused",
    }
    assert read_state(store, "l") == LineageState() == sensed(store)
    store.delete("inbox/b")
    land(store, "b/3.jsonl", 1)
    sensed(store)
    ended(store, "rejected")
    assert sorted(read_ended(store, "l")) == ["inbox/b/1.jsonl", "inbox/b/3.jsonl"]


def test_an_end_that_was_noted_by_a_process_that_died_counts(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    land(store, "b/1.jsonl", 1)
    sensed(store)
    with monkeypatch.context() as patch:
        patch.setattr(tasks.arrivals, "finish", lambda state, *_: state)
        ended(store, "promoted", version="1")
    assert read_state(store, "l").claimed is not None
    assert sensed(store) == LineageState()


def test_the_ends_of_several_years_are_read_and_the_last_one_counts(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(store, "b/1.jsonl", 1)
    sensed(store)
    ended(store, "refused")
    ends = read_ended(store, "l")

    class NextYear(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> NextYear:
            return cls(datetime.now(tz).year + 1, 1, 1, tzinfo=tz)

    monkeypatch.setattr("infra.lineage_state.datetime", NextYear)
    later = {key: end.model_copy(update={"outcome": "rejected"}) for key, end in ends.items()}
    note_ended(store, "l", later)
    assert len(list(store.list("arrivals/l"))) == 2 and read_ended(store, "l") == later


def test_a_copied_home_knows_what_has_ended_and_reads_no_copy_twice(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup that was put back."""
    land(store, "b/1.jsonl", 1)
    sensed(store)
    ended(store, "rejected", version="1")
    copy = store_at(str(shutil.copytree(tmp_path / "store", tmp_path / "copy")))
    assert sensed(copy) == LineageState()
    monkeypatch.setattr(FileStore, "_sha256_of", lambda *_: pytest.fail("it was read again"))
    assert sensed(copy) == LineageState()
