"""What is due and what waits, from a folder store: batches, the order of tasks, and the counting of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import tasks.waiting
from deal_core.errors import StoreError
from infra.store.local import FileStore, open_store
from tasks.inbox import Arrival, InboxLook, InboxState, look
from tasks.lineage.settings import WatchedLineage
from tasks.spec import parse
from tasks.waiting import Plan, freeze_batch, plan, read_batches, split_batch

NOW = datetime.now(UTC)
ROW = b'{"text": "a", "label": "b"}\n'


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    found = open_store(str(tmp_path))
    assert isinstance(found, FileStore)
    return found


@pytest.fixture(autouse=True)
def nothing_counted() -> Iterator[None]:
    """A process that has not counted anything."""
    tasks.waiting._counted.clear()
    yield
    tasks.waiting._counted.clear()


def land(store: FileStore, name: str, num_rows: int, age: float = 100) -> None:
    path = store.path_of(f"inbox/{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ROW * num_rows)
    os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))


def decide(store: FileStore, state: InboxState | None = None, **policy: Any) -> Plan:
    lineage = parse(WatchedLineage, {"lineage": "l", "retrain": policy}, "test")
    inbox, state = look(store), state or InboxState()
    return plan(store, lineage, inbox, state, inbox.open_for(state, (), retry_now=False), NOW)


def names(found: Plan) -> list[list[str]]:
    return [[info.key.removeprefix("inbox/") for info in due.files] for due in found.due]


def arrivals(store: FileStore) -> tuple[InboxLook, dict[str, Arrival]]:
    inbox = look(store)
    return inbox, {info.key.removeprefix("inbox/"): info for info in inbox.arrivals}


def test_by_default_each_file_is_an_arrival_and_no_row_is_counted(store: FileStore) -> None:
    land(store, "b/1.jsonl", 1, age=300)
    land(store, "a/1.jsonl", 1, age=200)
    land(store, "b/2.jsonl", 1, age=100)
    found = decide(store)
    assert names(found) == [["b/1.jsonl"], ["a/1.jsonl"], ["b/2.jsonl"]]
    assert found.waiting == () and not [due for due in found.due if due.is_fixed]
    assert [info.key for info in store.list("counts")] == []


def test_the_files_of_a_task_are_one_arrival_and_the_task_with_the_oldest_file_is_first(store: FileStore) -> None:
    land(store, "a/1.jsonl", 2, age=200)
    land(store, "b/1.jsonl", 2, age=300)
    land(store, "b/2.jsonl", 2, age=100)
    land(store, "c/1.jsonl", 1, age=900)
    found = decide(store, min_rows=2)
    assert names(found) == [["b/1.jsonl", "b/2.jsonl"], ["a/1.jsonl"]]
    assert all(due.is_fixed for due in found.due)
    assert {each.task: each.is_due for each in found.waiting} == {"a": True, "b": True, "c": False}


def test_what_lands_with_a_time_in_the_future_waits_from_the_first_look_on(store: FileStore) -> None:
    land(store, "b/1.jsonl", 2)
    future = (NOW + timedelta(days=365)).timestamp()
    os.utime(store.path_of("inbox/b/1.jsonl"), (future, future))
    (waiting,) = decide(store, min_rows=9, max_wait_days=1.0).waiting
    assert waiting.since <= datetime.now(UTC)
    assert waiting.until is not None and waiting.until <= datetime.now(UTC) + timedelta(days=1)


def test_an_open_batch_comes_first_and_takes_nothing_that_landed_since(store: FileStore) -> None:
    land(store, "b/1.jsonl", 2)
    _, files = arrivals(store)
    batch = freeze_batch(store, "l", "b", [files["b/1.jsonl"]], NOW)
    land(store, "b/0.jsonl", 2, age=500)
    land(store, "a/1.jsonl", 2, age=400)
    found = decide(store, min_rows=2)
    assert names(found) == [["b/1.jsonl"], ["a/1.jsonl"]]
    assert (found.due[0].batch, found.due[0].is_fixed) == (batch, False)
    why = {(each.task, each.is_due): each.why for each in found.waiting}
    assert why["b", False] == "An earlier batch of the task must end first"
    assert names(decide(store)) == [["b/1.jsonl"], ["a/1.jsonl"]], "also after the lineage got another policy"


def test_of_two_runs_one_fixes_a_batch_and_the_other_gets_the_same(store: FileStore) -> None:
    land(store, "b/1.jsonl", 2)
    land(store, "b/2.jsonl", 2)
    _, files = arrivals(store)
    first = freeze_batch(store, "l", "b", [files["b/1.jsonl"]], NOW)
    second = freeze_batch(store, "l", "b", [files["b/1.jsonl"], files["b/2.jsonl"]], NOW + timedelta(seconds=1))
    assert second == first and second.is_of([files["b/1.jsonl"]])
    assert not second.is_of([files["b/1.jsonl"], files["b/2.jsonl"]])


@pytest.mark.parametrize("outcome", ["promoted", "refused", "skipped", "held"])
def test_a_batch_ends_with_the_outcome_of_its_files(store: FileStore, outcome: Any) -> None:
    land(store, "b/1.jsonl", 2)
    inbox, files = arrivals(store)
    batch, state = freeze_batch(store, "l", "b", [files["b/1.jsonl"]], NOW), InboxState()
    assert not batch.is_over(inbox, state, NOW)
    state.record(files["b/1.jsonl"], outcome, "", now=NOW)
    assert batch.is_over(inbox, state, NOW)


def test_a_batch_that_failed_waits_for_its_next_try_and_ends_when_there_is_none(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.inbox.PAUSE", timedelta(days=1))
    land(store, "b/1.jsonl", 2)
    inbox, files = arrivals(store)
    batch, state = freeze_batch(store, "l", "b", [files["b/1.jsonl"]], NOW), InboxState()
    state.record(files["b/1.jsonl"], "failed", "", now=NOW)
    assert not batch.is_over(inbox, state, NOW)
    land(store, "b/2.jsonl", 2)
    assert names(decide(store, state, min_rows=2)) == [], "the newer file waits for the end of the batch"
    state.record(files["b/1.jsonl"], "failed", "", now=NOW, is_final=True)
    assert batch.is_over(inbox, state, NOW)
    assert names(decide(store, state, min_rows=2)) == [["b/2.jsonl"]]


def test_a_batch_with_a_file_that_changed_or_is_gone_is_over_and_the_others_wait_again(store: FileStore) -> None:
    land(store, "b/1.jsonl", 2)
    land(store, "b/2.jsonl", 2)
    _, files = arrivals(store)
    batch = freeze_batch(store, "l", "b", [*files.values()], NOW)
    land(store, "b/2.jsonl", 3, age=50)
    assert batch.is_over(look(store), InboxState(), NOW)
    assert names(decide(store, min_rows=5)) == [["b/1.jsonl", "b/2.jsonl"]]
    store.delete("inbox/b/2.jsonl")
    assert batch.is_over(look(store), InboxState(), NOW)
    assert names(decide(store, min_rows=5)) == []


def test_a_batch_that_was_split_is_learned_file_by_file(store: FileStore) -> None:
    land(store, "b/1.jsonl", 2, age=200)
    land(store, "b/2.jsonl", 2, age=100)
    inbox, files = arrivals(store)
    split_batch(store, freeze_batch(store, "l", "b", [*files.values()], NOW))
    state = InboxState()
    assert names(decide(store, state, min_rows=2)) == [["b/1.jsonl"], ["b/2.jsonl"]]
    state.record(files["b/1.jsonl"], "refused", "", now=NOW)
    assert names(decide(store, state, min_rows=2)) == [["b/2.jsonl"]]
    (batch,) = read_batches(store, "l")
    assert not batch.is_over(inbox, state, NOW)
    state.record(files["b/2.jsonl"], "promoted", "", now=NOW)
    assert batch.is_over(inbox, state, NOW)


def test_a_damaged_batch_is_named_with_its_remedy(store: FileStore) -> None:
    land(store, "b/1.jsonl", 2)
    store.put_bytes("batches/l/b.json", b"nonsense")
    with pytest.raises(StoreError, match=r"batches/l/b.json, the files that are learned together.*Delete it"):
        decide(store, min_rows=2)


def test_what_a_person_let_go_on_is_due(store: FileStore) -> None:
    land(store, "b/1.jsonl", 2)
    _, files = arrivals(store)
    state = InboxState()
    state.record(files["b/1.jsonl"], "requeued", "", now=NOW)
    assert names(decide(store, state, min_rows=99)) == [["b/1.jsonl"]]


def test_a_file_that_cannot_be_counted_is_due_alone(store: FileStore) -> None:
    land(store, "b/empty.jsonl", 0, age=300)
    land(store, "b/1.jsonl", 2, age=200)
    store.put_bytes("inbox/b/notes.txt", b"x")
    store.put_bytes("inbox/b/damaged.parquet", b"x")
    found = decide(store, min_rows=3)
    assert sorted(names(found)) == [["b/damaged.parquet"], ["b/empty.jsonl"], ["b/notes.txt"]]
    assert [(each.num_files, each.num_rows) for each in found.waiting] == [(1, 2)]


def test_a_folder_is_one_arrival_with_all_its_files_and_rows(store: FileStore) -> None:
    for name in ("part-1.jsonl", "part-2.jsonl"):
        land(store, f"b/may/{name}", 2)
    store.put_bytes("inbox/b/may/_SUCCESS", b"")
    found = decide(store, min_rows=4)
    assert names(found) == [["b/may"]]
    assert [(each.num_files, each.num_rows) for each in found.waiting] == [(2, 4)]


def test_a_file_is_counted_once_by_all_processes_until_it_changes(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    count = tasks.waiting._rows_of
    monkeypatch.setattr(tasks.waiting, "_rows_of", lambda store, key: counted.append(key) or count(store, key))
    land(store, "b/1.jsonl", 2)
    for _ in range(2):
        tasks.waiting._counted.clear()  # another process
        assert decide(store, min_rows=9).waiting[0].num_rows == 2
    assert counted == ["inbox/b/1.jsonl"]
    land(store, "b/1.jsonl", 4, age=50)
    assert decide(store, min_rows=9).waiting[0].num_rows == 4
    land(store, "b/2.jsonl", 1)
    store.delete("inbox/b/1.jsonl")
    decide(store, min_rows=9)
    assert b"b/1.jsonl" not in store.get_bytes("counts/b.json"), "what is gone is not kept"
    assert counted == ["inbox/b/1.jsonl", "inbox/b/1.jsonl", "inbox/b/2.jsonl"]
