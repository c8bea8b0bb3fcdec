"""The inbox: order, half-written files, and what is never looked at twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deal_core.errors import StoreError
from infra.store.base import ObjectInfo
from infra.store.keys import INBOX, task_of
from infra.store.local import FileStore, open_store
from tasks.inbox import (
    PAUSE,
    Arrival,
    InboxLook,
    InboxState,
    find_landed,
    known_state,
    list_arrivals,
    look,
    read_state,
    recognise,
    settle,
    task_spec,
    write_state,
)
from tasks.spec import TaskFieldsError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def info(key: str = "inbox/bank/a.csv", etag: str = "1", *, beside: str = "") -> Arrival:
    """A file that has landed, and the ETag of its task file, if there is one."""
    file = ObjectInfo(key=key, size=1, etag=etag, modified=NOW - timedelta(seconds=100))
    task_file = replace(file, key="inbox/bank/task.yaml", etag=beside)
    return Arrival(key=key, files=(file,), companions=(task_file,) if beside else ())


def recent(age: float, beside_age: float | None = None) -> Arrival:
    """A file that changed some seconds ago, and so did its task file, if it has one."""
    (file,) = info().files
    file = replace(file, modified=datetime.now(UTC) - timedelta(seconds=age))
    if beside_age is None:
        return Arrival(key=file.key, files=(file,))
    modified = datetime.now(UTC) - timedelta(seconds=beside_age)
    return Arrival(key=file.key, files=(file,), companions=(replace(file, etag="2", modified=modified),))


def settled(arrival: Arrival, stamps: dict[str, str]) -> tuple[list[Arrival], list[Arrival]]:
    """Whether the arrival is complete after two seconds without a change, or may still be written."""
    inbox = InboxLook((arrival,), {})
    return settle(inbox, InboxState(), (), stamps, settle_seconds=2.0, retry_now=False)


def test_arrivals_come_oldest_first_and_nothing_else_counts(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    names = [
        "bank/late.csv",
        "clinic/early.csv",
        "bank/task.yaml",
        "bank/.hidden",
        "stray.csv",
        "bank/deep/_x.csv",
        "bank/test.csv",
    ]
    for number, name in enumerate(names):
        store.put_bytes(f"inbox/{name}", b"x")
        os.utime(tmp_path / "inbox" / name, (number, number))
    os.utime(tmp_path / "inbox/clinic/early.csv", (-5, -5))
    found = [entry.key for entry in list_arrivals(store.list(INBOX), test_data=["inbox/bank/test.csv"])]
    assert found == ["inbox/clinic/early.csv", "inbox/bank/late.csv"]
    assert task_of(found[0]) == "clinic"


def test_a_file_that_changed_since_the_last_look_is_left_alone() -> None:
    fresh = recent(age=0.5)
    assert settled(fresh, {}) == ([], [fresh])
    assert settled(fresh, {fresh.key: "0"}) == ([], [fresh])
    assert settled(fresh, {fresh.key: fresh.etag}) == ([fresh], [])


def test_an_old_file_needs_no_second_look() -> None:
    old = recent(age=3)
    assert settled(old, {}) == ([old], [])


@pytest.mark.parametrize("outcome", ["promoted", "rejected", "repeat", "refused"])
def test_what_was_handled_is_closed_until_its_content_changes(outcome: str) -> None:
    state = InboxState()
    state.record(info(), outcome, "", now=NOW)  # type: ignore[arg-type]
    later = NOW + 100 * PAUSE
    assert not state.is_open(info(), later, retry_now=True)
    assert not state.is_open(info(), later, retry_now=False)
    assert state.is_open(info(etag="2"), later, retry_now=False)


def test_a_copied_home_knows_what_was_handled(tmp_path: Path) -> None:
    """A backup that was put back."""
    store = open_store(str(tmp_path / "store"))
    store.put_bytes("inbox/bank/a.csv", b"x")
    (info,) = list_arrivals(store.list(INBOX))
    state = InboxState()
    state.record(info, "held", "a person cancelled its run", now=NOW)
    write_state(store, "l", state)
    copy = open_store(str(shutil.copytree(tmp_path / "store", tmp_path / "copy")))
    (copied,) = list_arrivals(copy.list(INBOX))
    assert not read_state(copy, "l").is_open(copied, NOW, retry_now=False)
    state = recognise(copy, "l", look(copy), read_state(copy, "l"))
    assert state == read_state(copy, "l") and state.files[copied.key].etag == copied.etag, "no copy is read twice"
    path = tmp_path / "copy" / "inbox" / "bank" / "a.csv"
    status = path.stat()
    path.write_bytes(b"y")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (corrected,) = list_arrivals(copy.list(INBOX))
    assert state.is_open(corrected, NOW, retry_now=False), "rsync -t corrects a file like this"
    assert recognise(copy, "l", look(copy), state) == state


def test_a_failed_run_is_tried_again_for_ever_ever_more_seldom() -> None:
    state, now, minutes = InboxState(), NOW, []
    for _ in range(9):
        due = state.record(info(), "failed", "", now=now).due()
        assert due is not None
        assert not state.is_open(info(), due - timedelta(seconds=1), retry_now=False)
        assert state.is_open(info(), due, retry_now=False)
        assert state.is_open(info(), now, retry_now=True)
        minutes.append((due - now) / timedelta(minutes=1))
        now = due
    assert minutes == [1, 2, 4, 8, 16, 32, 64, 64, 64]


def test_a_clock_that_was_set_back_keeps_no_failed_arrival_waiting() -> None:
    state = InboxState()
    state.record(info(), "failed", "", now=NOW + timedelta(days=365))
    assert state.is_open(info(), NOW, retry_now=False)


def test_a_run_that_would_fail_again_is_tried_again_only_when_asked() -> None:
    state = InboxState()
    assert state.record(info(beside="1"), "failed", "", now=NOW, is_final=True).due() is None
    assert not state.is_open(info(beside="1"), NOW + timedelta(days=365), retry_now=False)
    assert state.is_open(info(beside="1"), NOW, retry_now=True)
    assert state.is_open(info(beside="2"), NOW, retry_now=False)
    assert state.record(info(beside="1"), "failed", "", now=NOW).due() is not None


def test_a_file_that_kills_its_reader_twice_is_set_aside_until_it_changes() -> None:
    state = InboxState()
    first = state.record(info(), "failed", "It died.", now=NOW, has_killed_reader=True)
    assert (first.outcome, first.due()) == ("failed", NOW + timedelta(minutes=1))
    assert state.record(info(), "failed", "the server is away", now=NOW).outcome == "failed", "no fault of the file"
    second = state.record(info(), "failed", "It died.", now=NOW, has_killed_reader=True)
    assert (second.outcome, second.num_tries, second.due()) == ("refused", 3, None)
    assert second.message == "It died. It did so in 2 tries, so it is set aside until it changes."
    assert not state.is_open(info(), NOW + timedelta(days=365), retry_now=True)
    changed = state.record(info(etag="2"), "failed", "It died.", now=NOW, has_killed_reader=True)
    assert (changed.outcome, changed.num_reader_deaths) == ("failed", 1)


@pytest.mark.parametrize("outcome", ["refused", "failed"])
def test_what_was_of_no_use_is_open_again_when_what_lies_beside_it_changes(outcome: str) -> None:
    state = InboxState()
    for _ in range(2):
        state.record(info(beside="1"), outcome, "", now=NOW)  # type: ignore[arg-type]
    assert not state.is_open(info(beside="1"), NOW, retry_now=False)
    assert state.is_open(info(beside="2"), NOW, retry_now=False)
    assert state.record(info(beside="2"), "failed", "", now=NOW).num_tries == 1


def test_a_changed_file_starts_counting_anew() -> None:
    state = InboxState()
    for _ in range(3):
        state.record(info(), "failed", "", now=NOW)
    assert state.record(info(etag="2"), "failed", "", now=NOW).num_tries == 1


def test_a_file_refused_before_counts_its_tries_anew() -> None:
    state = InboxState()
    for _ in range(3):
        state.record(info(), "refused", "", now=NOW)
    state.record(info(), "failed", "", now=NOW)
    assert state.is_open(info(), NOW + PAUSE, retry_now=False)


def test_what_lies_beside_a_file_must_be_complete_too() -> None:
    old = recent(age=50, beside_age=0.5)
    assert settled(old, {}) == ([], [old])
    assert settled(old, {old.key: f"{old.etag} 1"}) == ([], [old])
    assert settled(old, {old.key: f"{old.etag} {old.stamp}"}) == ([old], [])


def test_a_task_file_lies_beside_the_arrivals_of_its_task_alone(tmp_path: Path) -> None:
    store = folder_in(tmp_path, "bank/a.csv", "clinic/a.csv", "clinic/task.yaml")
    assert {arrival.key: len(arrival.companions) for arrival in look(store).arrivals} == {
        "inbox/bank/a.csv": 0,
        "inbox/clinic/a.csv": 1,
    }


def test_the_state_survives_in_the_store_apart_for_each_lineage(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    state = InboxState()
    state.record(info(), "promoted", "done", now=NOW, version="3")
    write_state(store, "a", state)
    assert read_state(store, "a") == state
    assert read_state(store, "b") == InboxState()


def test_a_state_is_read_again_when_it_has_changed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = open_store(str(tmp_path)), list[str]()
    original = FileStore.get_bytes
    monkeypatch.setattr(FileStore, "get_bytes", lambda self, key: read.append(key) or original(self, key))
    assert known_state(store, "a") == InboxState() and not read
    state = InboxState()
    for number in range(3):
        state.record(info(f"inbox/bank/{number}.csv"), "promoted", "", now=NOW)
        write_state(store, "a", state)
        write_state(store, "b", InboxState())
        for _ in range(3):
            assert known_state(store, "a") == state and known_state(store, "b") == InboxState()
    assert read.count("watch/a.json") == 3
    store.delete("watch")
    assert known_state(store, "a") == InboxState()


def test_a_state_that_changes_while_it_is_read_is_read_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, state = open_store(str(tmp_path)), InboxState()
    write_state(store, "a", state)
    original = FileStore.get_bytes

    def change_then_read(self: FileStore, key: str) -> bytes:
        monkeypatch.undo()
        content = original(self, key)
        state.record(info(), "promoted", "", now=NOW)
        write_state(store, "a", state)
        return content

    monkeypatch.setattr(FileStore, "get_bytes", change_then_read)
    assert known_state(store, "a") == InboxState()
    assert known_state(store, "a") == state


def test_a_note_of_a_file_that_is_gone_goes_unless_a_version_came_of_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bank/there.csv", b"x")
    state = InboxState()
    for key in ("inbox/bank/there.csv", "inbox/bank/gone.csv"):
        state.record(info(key), "refused", "", now=NOW)
    state.record(info("inbox/bank/learned.csv"), "promoted", "", now=NOW, version="1")
    assert state.gone(store) == ["inbox/bank/gone.csv"]


def test_a_broken_state_says_what_to_do(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("watch/a.json", b"{nonsense")
    with pytest.raises(StoreError, match="hold the lineage, then delete it"):
        read_state(store, "a")


def test_what_lies_in_a_wrong_folder_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bill/task.yaml", b"test_data: held/out.csv\n")
    for key in (
        "may.csv",
        "bill/held/may.csv",
        "bill/a.csv",
        "bill/held/out.csv",
        "bill/.tmp/x.csv",
        "bill/_delta_log/0.json",
        "bill/2026/_SUCCESS",
        ".DS_Store",
        "task.yaml",
        "bill/2026/.x",
    ):
        store.put_bytes(f"inbox/{key}", b"x")
    for _ in range(2):
        assert [arrival.key for arrival in look(store).arrivals] == ["inbox/bill/a.csv"]
    assert [record.getMessage() for record in caplog.records] == [
        "Skipped 'inbox/bill/held/may.csv': it is in a folder with the task's test rows, which is no arrival; move it "
        "to a folder of its own.",
        "Skipped 'inbox/may.csv': it is not in a task's folder; move it to inbox/TASK/may.csv.",
    ]


@pytest.mark.parametrize("name", ["../test.csv", "/data/test.csv", "held//test.csv", "s3://bucket/test.csv", "''"])
def test_test_rows_lie_in_the_folder_of_their_task(tmp_path: Path, name: str) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bill/task.yaml", f"test_data: {name}\n".encode())
    store.put_bytes("inbox/bill/a.csv", b"x")
    assert [arrival.key for arrival in look(store).arrivals] == ["inbox/bill/a.csv"]
    with pytest.raises(TaskFieldsError, match=r"task\.yaml: 'test_data': no file in the task's folder .* such as test"):
        task_spec(store, "inbox/bill/a.csv")


def test_what_is_no_regular_file_is_no_arrival_and_holds_nothing_up(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bill/a.csv", b"x")
    os.mkfifo(tmp_path / "inbox" / "bill" / "fifo.csv")
    os.mkfifo(tmp_path / "inbox" / "bill" / "task.yaml")
    assert [arrival.key for arrival in look(store).arrivals] == ["inbox/bill/a.csv"]
    with pytest.raises(TaskFieldsError, match=r"task\.yaml' in .*: it is a FIFO, and only regular files are read"):
        task_spec(store, "inbox/bill/a.csv")


def test_while_a_task_file_cannot_be_read_its_task_learns_nothing_and_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    for key, content in (
        ("bill/a.csv", b"x"),
        ("bill/tests.csv", b"x"),
        ("bill/task.yaml", b"test_data: tests.csv"),
        ("bank/a.csv", b"x"),
    ):
        store.put_bytes(f"inbox/{key}", content)
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "get_bytes", unreadable)
        assert [arrival.key for arrival in look(store).arrivals] == ["inbox/bank/a.csv"]
    assert "Task 'bill' learns nothing, as its task file cannot be read: permission denied" in caplog.text
    assert {arrival.key for arrival in look(store).arrivals} == {"inbox/bank/a.csv", "inbox/bill/a.csv"}


def unreadable(*_: object, **__: object) -> bytes:
    raise StoreError("permission denied")


def test_a_task_file_has_a_bound(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bill/a.csv", b"x")
    with (tmp_path / "inbox" / "bill" / "task.yaml").open("wb") as file:
        file.truncate(2**40)
    assert [arrival.key for arrival in look(store).arrivals] == ["inbox/bill/a.csv"]
    with pytest.raises(TaskFieldsError, match=r"task\.yaml is larger than 256 KiB"):
        task_spec(store, "inbox/bill/a.csv")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bill/task.yaml", b"format: labelled\nformat: chat\n")
    with pytest.raises(TaskFieldsError, match=r"task\.yaml has the key 'format' twice"):
        task_spec(store, "inbox/bill/a.csv")


def folder_in(tmp_path: Path, *names: str) -> FileStore:
    """A store with files in its inbox, which all changed long ago by their own times."""
    store = FileStore(tmp_path)
    for name in names:
        store.put_bytes(f"inbox/{name}", b"text,label\na,b\n")
        os.utime(tmp_path / "inbox" / name, (1, 1))
    return store


def looked(store: FileStore, stamps: dict[str, str] | None = None) -> tuple[list[str], list[str]]:
    """The keys of the arrivals that are complete, and of those that may still be written."""
    seen = {} if stamps is None else stamps
    found = settle(look(store), InboxState(), (), seen, settle_seconds=2.0, retry_now=False)
    return [info.key for info in found.complete], [info.key for info in found.growing]


def test_a_folder_is_one_arrival_with_the_files_that_are_read(tmp_path: Path) -> None:
    names = ("part-1.csv", "part-0.csv", "day=2/part-0.csv", "_SUCCESS", "_log/0.csv", ".part-0.csv.crc")
    store = folder_in(tmp_path, *(f"bank/may/{name}" for name in names), "bank/june.csv")
    may, june = sorted(look(store).arrivals, key=lambda info: info.key, reverse=True)
    assert (june.key, may.key) == ("inbox/bank/june.csv", "inbox/bank/may") and task_of(may.key) == "bank"
    read = ["day=2/part-0.csv", "part-0.csv", "part-1.csv"]
    assert [info.key.removeprefix("inbox/bank/may/") for info in may.files] == read
    assert find_landed(store, may.key) == may and find_landed(store, june.key) == june
    assert find_landed(store, "inbox/bank/none") is None


def test_the_etag_of_a_folder_changes_with_its_files_and_not_with_its_mark(tmp_path: Path) -> None:
    store = folder_in(tmp_path, "bank/may/a.csv", "bank/may/b.csv")

    def etag() -> str:
        (info,) = look(store).arrivals
        return info.etag

    before = etag()
    store.put_bytes("inbox/bank/may/_SUCCESS", b"")
    assert etag() == before
    store.put_bytes("inbox/bank/may/b.csv", b"text,label\nc,d\n")
    changed = etag()
    store.put_bytes("inbox/bank/may/c.csv", b"text,label\ne,f\n")
    assert len({before, changed, etag()}) == 3


def test_a_folder_with_a_mark_is_complete(tmp_path: Path) -> None:
    store = folder_in(tmp_path, "bank/may/a.csv", "bank/may/_SUCCESS")
    assert looked(store) == (["inbox/bank/may"], [])


def test_a_folder_without_a_mark_is_complete_when_nothing_has_changed_for_the_set_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files keep the old times of their originals, as copies do: what counts is when they came here."""
    store, stamps = folder_in(tmp_path, "bank/may/a.csv", "bank/may/deep/_SUCCESS"), dict[str, str]()
    for _ in range(3):
        assert looked(store, stamps) == ([], ["inbox/bank/may"]), "looking again is no reason to learn it"
    monkeypatch.setenv("DEAL_INBOX_SETTLE_SECONDS", "0")
    assert looked(store) == (["inbox/bank/may"], [])


class Ahead(FileStore):
    """A store whose clock runs a year ahead."""

    def _list_all(self, prefix: str) -> Iterator[ObjectInfo]:
        year = timedelta(days=365)
        for info in super()._list_all(prefix):
            yield replace(info, modified=info.modified + year, landed=info.landed and info.landed + year)


@pytest.mark.parametrize("name", ["a.jsonl", "task.yaml"])
def test_a_file_from_a_clock_that_runs_ahead_becomes_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each look is of a process of its own, which knows no other look's stamps."""
    store = folder_in(tmp_path, "bank/a.jsonl", "bank/may/a.jsonl")
    store.put_bytes("inbox/bank/task.yaml", b"{}")
    year = datetime.now(UTC).timestamp() + 365 * 86400
    os.utime(tmp_path / "inbox" / "bank" / name, (year, year))
    monkeypatch.setenv("DEAL_INBOX_SETTLE_SECONDS", "0")
    settle_at_once = [settle(look(store), InboxState(), (), {}, settle_seconds=0, retry_now=False) for _ in range(2)]
    assert {info.key for info in settle_at_once[1].complete} == {"inbox/bank/a.jsonl", "inbox/bank/may"}


def test_the_time_of_the_first_look_at_a_file_from_the_future_stays(tmp_path: Path) -> None:
    store = Ahead(tmp_path)
    store.put_bytes("inbox/bank/a.jsonl", b"x")
    start = datetime.now(UTC)
    (first,), (second,) = look(store).arrivals, look(store).arrivals
    assert start <= first.landed == second.landed <= datetime.now(UTC)
    assert first.modified == first.landed
    store.put_bytes("inbox/bank/a.jsonl", b"y")
    (changed,) = look(store).arrivals
    assert changed.landed > first.landed, "it is another file"
    store.delete("first_looks.json")
    (again,) = look(store).arrivals
    assert again.landed > changed.landed


def test_a_file_of_the_present_is_noted_nowhere(tmp_path: Path) -> None:
    store = folder_in(tmp_path, "bank/a.jsonl")
    store.put_bytes("inbox/bank/b.jsonl", b"x")
    assert len(look(store).arrivals) == 2 and not store.exists("first_looks.json")


def test_a_folder_of_test_rows_is_a_companion(tmp_path: Path) -> None:
    store = folder_in(tmp_path, "bank/may.csv", "bank/tests/a.csv", "bank/tests/b.csv", "bank/tests/_SUCCESS")
    store.put_bytes("inbox/bank/task.yaml", b"test_data: tests\n")
    inbox = look(store)
    assert [info.key for info in inbox.arrivals] == ["inbox/bank/may.csv"] and inbox.misplaced == {}
    before = inbox.arrivals[0].stamp
    store.put_bytes("inbox/bank/tests/b.csv", b"text,label\nc,d\n")
    assert look(store).arrivals[0].stamp != before
    assert str(task_spec(store, "inbox/bank/may.csv").test_data).endswith("/inbox/bank/tests")


def test_a_folder_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    store, state = folder_in(tmp_path, "bank/may/a.csv"), InboxState()
    (info,) = look(store).arrivals
    state.record(info, "refused", "", now=NOW)
    assert state.gone(store) == []
    store.delete(info.key)
    assert state.gone(store) == ["inbox/bank/may"]
