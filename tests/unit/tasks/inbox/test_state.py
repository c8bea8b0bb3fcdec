"""A look at the inbox: what counts, and what is told of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.store.local import open_store
from tasks.adaptation.ingest import TaskFieldsError
from tasks.inbox.state import look, task_spec


def test_what_lies_too_deep_or_not_deep_enough_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bill/task.yaml", b"test_data: held/out.csv\n")
    for key in ("may.csv", "bill/2026/11/may.csv", "bill/a.csv", "bill/held/out.csv", "bill/.tmp/x.csv", ".DS_Store",
                "task.yaml", "bill/2026/task.yaml", "bill/2026/.x"):  # fmt: skip
        store.put_bytes(f"inbox/{key}", b"x")
    for _ in range(2):
        assert [arrival.key for arrival in look(store).arrivals] == ["inbox/bill/a.csv"]
    assert [record.getMessage() for record in caplog.records] == [
        "Skipped 'inbox/bill/2026/11/may.csv': it lies in a folder within its task's folder, where nothing is looked "
        "for; move it to inbox/bill/2026-11-may.csv.",
        "Skipped 'inbox/may.csv': it lies in no task's folder; move it to inbox/TASK/may.csv.",
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
