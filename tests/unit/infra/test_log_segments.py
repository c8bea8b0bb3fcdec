"""A segment on this machine that cannot be used does not keep the others back; a damaged line is left out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deal_core.errors import StoreError
from deal_core.monitoring.feedback import read_entry
from infra.log_segments import Log, SegmentWriter, read_log, ship
from infra.predictions import feedback_log, prediction_log, read_feedback
from infra.serving.prediction_log import LOG, PredictionLog
from infra.store.keys import log_key
from infra.store.local import FileStore

WAIT_SECONDS = 60


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def wait_until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def put_unusable(log: Log, name: str) -> Path:
    """A segment that cannot be opened, as a file of another user, for a test that may run as root."""
    log.folder.mkdir(parents=True, exist_ok=True)
    path = log.folder / f"{name}.jsonl"
    path.symlink_to(path)
    return path


def test_what_can_be_moved_is_moved_and_the_first_problem_is_raised(tmp_path: Path, store: FileStore) -> None:
    log = prediction_log(tmp_path, "l")
    first, second = put_unusable(log, "20260101T000000-a"), put_unusable(log, "20260102T000000-a")
    other = log.folder / "20260103T000000-a.jsonl"
    other.write_text(json.dumps({"id": 3}) + "\n")
    SegmentWriter(log).write([{"id": "good"}])
    with pytest.raises(StoreError, match=rf"{first.name} cannot be used"):
        ship(store, log, everything=True)
    assert log.segments() == [first, second, other] and len(log.stored(store)) == 1
    for path in (first, second, other):
        path.unlink()
    assert read_log(store, log, columns=["id"]).to_pylist() == [{"id": "good"}]


def test_a_store_that_is_away_is_asked_once(tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    log, asked = prediction_log(tmp_path, "l"), list[str]()

    def away(key: str, data: bytes) -> bool:
        asked.append(key)
        raise StoreError("away")

    for number in range(3):
        SegmentWriter(log).write([{"id": f"{number}"}])
    monkeypatch.setattr(store, "put_bytes", away)
    with pytest.raises(StoreError, match="away"):
        ship(store, log, everything=True)
    assert len(asked) == 1 and len(log.segments()) == 3


@pytest.mark.parametrize("line", ["3", "null", '"a text"', "[]", '{"id": "half', "\x00\x00"])
def test_a_line_that_is_no_row_is_left_out(tmp_path: Path, store: FileStore, line: str) -> None:
    log = prediction_log(tmp_path, "l")
    SegmentWriter(log).write([{"id": "a"}])
    (path,) = log.segments()
    path.write_text(line + "\n" + path.read_text())
    assert read_log(store, log, columns=["id"]).to_pylist() == [{"id": "a"}]
    assert ship(store, log, everything=True) == 1 and not log.segments()


def test_a_server_moves_the_other_log_and_keeps_the_retention(
    tmp_path: Path, store: FileStore, caplog: pytest.LogCaptureFixture
) -> None:
    old = log_key("feedback", "l", f"{datetime.now(UTC) - timedelta(days=40):%Y%m%dT%H%M%S}-x")
    store.put_bytes(old, b"")
    bad = put_unusable(prediction_log(tmp_path, "l"), f"{datetime.now(UTC) - timedelta(days=1):%Y%m%dT%H%M%S}-a")
    log = PredictionLog(store, "l", keeps_texts=False, retention_days=30)
    log.take_feedback([read_entry({"id": "0" * 32, "label": "a"}, "", source="api", now=1.0).feedback])
    with caplog.at_level(logging.WARNING, LOG.name):
        log.start()
        try:
            wait_until(lambda: store.find(old) is None)
        finally:
            log.close()
    assert not feedback_log(tmp_path, "l").segments() and len(feedback_log(tmp_path, "l").stored(store)) == 1
    assert [record.getMessage() for record in caplog.records].count(
        f"Segments of the prediction log were not moved or removed: {bad} cannot be used (Too many levels of symbolic "
        "links); give the command as the user who runs deal serve."
    ) == 1
    bad.unlink()
    assert [*read_feedback(store, "l")["id"]] == ["0" * 32]
