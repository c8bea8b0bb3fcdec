"""The inbox: order, half-written files, and what is never looked at twice."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deal_core.errors import StoreError
from infra.store.keys import INBOX, task_of
from infra.store.local import FileStore
from infra.store.opening import store_at
from tasks.inbox import (
    find_landed,
    list_arrivals,
    look,
    task_spec,
)
from tasks.spec import TaskFieldsError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def test_arrivals_come_oldest_first_and_nothing_else_counts(tmp_path: Path) -> None:
    store = store_at(str(tmp_path))
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


def test_a_task_file_lies_beside_the_arrivals_of_its_task_alone(tmp_path: Path) -> None:
    store = folder_in(tmp_path, "bank/a.csv", "clinic/a.csv", "clinic/task.yaml")
    assert {arrival.key: len(arrival.companions) for arrival in look(store).arrivals} == {
        "inbox/bank/a.csv": 0,
        "inbox/clinic/a.csv": 1,
    }


def test_what_lies_in_a_wrong_folder_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_at(str(tmp_path))
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
    store = store_at(str(tmp_path))
    store.put_bytes("inbox/bill/task.yaml", f"test_data: {name}\n".encode())
    store.put_bytes("inbox/bill/a.csv", b"x")
    assert [arrival.key for arrival in look(store).arrivals] == ["inbox/bill/a.csv"]
    with pytest.raises(TaskFieldsError, match=r"task\.yaml: 'test_data': no file in the task's folder .* such as test"):
        task_spec(store, "inbox/bill/a.csv")


def test_while_a_task_file_cannot_be_read_its_task_learns_nothing_and_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_at(str(tmp_path))
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


def folder_in(tmp_path: Path, *names: str) -> FileStore:
    """A store with files in its inbox, which all changed long ago by their own times."""
    store = FileStore(tmp_path)
    for name in names:
        store.put_bytes(f"inbox/{name}", b"text,label\na,b\n")
        os.utime(tmp_path / "inbox" / name, (1, 1))
    return store


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


def test_a_folder_of_test_rows_is_a_companion(tmp_path: Path) -> None:
    store = folder_in(tmp_path, "bank/may.csv", "bank/tests/a.csv", "bank/tests/b.csv", "bank/tests/_SUCCESS")
    store.put_bytes("inbox/bank/task.yaml", b"test_data: tests\n")
    inbox = look(store)
    assert [info.key for info in inbox.arrivals] == ["inbox/bank/may.csv"] and inbox.misplaced == {}
    before = inbox.arrivals[0].stamp
    store.put_bytes("inbox/bank/tests/b.csv", b"text,label\nc,d\n")
    assert look(store).arrivals[0].stamp != before
    assert str(task_spec(store, "inbox/bank/may.csv").test_data).endswith("/inbox/bank/tests")
