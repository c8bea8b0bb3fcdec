"""The prediction log loses no row that it has written, counts none twice, and never fails a request."""

from __future__ import annotations

import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow.parquet as pq
import pytest

from deal_core.errors import ConfigError, StoreError
from deal_core.evaluation.answering import InputRow
from deal_core.monitoring.feedback import Feedback, read_entry
from deal_core.monitoring.predictions import COLUMNS, ROLLOUT_COLUMNS, Prediction
from infra import log_segments
from infra.log_segments import SegmentWriter, get_table, read_log, ship
from infra.predictions import (
    PREDICTION_SCHEMA,
    feedback_log,
    feedback_without_answer,
    forget_answers,
    prediction_log,
    read_feedback,
    read_predictions,
    remove_feedback,
)
from infra.serving import prediction_log as logging_module
from infra.serving.answer_ids import AnswerIds
from infra.serving.prediction_log import PredictionLog, open_prediction_log
from infra.store.keys import log_key
from infra.store.local import FileStore
from tasks.housekeeping.garbage import ship_logs
from tests.served import WAIT_SECONDS, Champion, running

SECRET = "Zanzibar"
ROWS = {"dataframe_records": [{"input": f"the {SECRET} text", "task": "bank"}, {"input": " A ", "task": None}]}


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


@contextmanager
def logging_to(store: FileStore, home: Path, *, keeps_texts: bool = False) -> Iterator[PredictionLog]:
    log = PredictionLog(store, "l", keeps_texts=keeps_texts, retention_days=30)
    log.start()
    try:
        yield log
    finally:
        log.close()


def ask(log: PredictionLog, *texts: str) -> list[str]:
    return [*Champion(log).ask([InputRow(text, "bank") for text in texts], lambda: False).ids]


def wait_until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def all_bytes(folder: Path) -> bytes:
    """The content of every file; Parquet files also without their compression."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    tables = [json.dumps(pq.read_table(path).to_pylist()).encode() for path in files if path.suffix == ".parquet"]
    return b"".join([*(path.read_bytes() for path in files), *tables])


def test_the_stored_columns_are_those_of_a_row() -> None:
    assert PREDICTION_SCHEMA.names == [*COLUMNS, *ROLLOUT_COLUMNS] == [each.name for each in fields(Prediction)]


@pytest.mark.parametrize("keeps_texts", [False, True])
def test_every_answer_is_one_row_and_numbers_hold_no_text(tmp_path: Path, store: FileStore, keeps_texts: bool) -> None:
    with (
        logging_to(store, tmp_path, keeps_texts=keeps_texts) as log,
        running(Champion(log), tmp_path / "log", api_key="k") as port,
    ):
        headers = {"Authorization": "Bearer k"}
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json=ROWS, headers=headers).json()["predictions"]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)
        several = client.completions.create(model="l", prompt=[SECRET, "b"])
        message = {"role": "user", "content": f"a {SECRET} chat"}
        chat = client.chat.completions.create(model="l/talk", messages=[message])  # type: ignore[list-item]
    ids = [*(row["id"] for row in answer), *(choice.id for choice in several.choices), chat.id.split("-")[1]]  # type: ignore[attr-defined]
    assert several.id == f"cmpl-{ids[2]}" and answer[0]["confidence"] == 0.75
    found = read_predictions(store, "l")
    assert [*found.columns] == [*COLUMNS] and [*found["id"]] == ids
    assert [*found["task"]] == ["bank"] * 4 + ["talk"] and set(found["version"]) == {"3"}
    assert [*found["label"]] == [None, "a", None, "b", None]
    assert [*found["is_label"]] == [False, True, False, True, None]
    assert found["chars"][1] == 1 and found["seconds"][0] == 0.25
    texts = [f"the {SECRET} text", "A", SECRET, "b", json.dumps([message])]
    assert [*found["input"]] == (texts if keeps_texts else [None] * 5)
    outputs = [text.upper() for text in (texts[0], " A ", *texts[2:])]
    assert [*found["output"]] == (outputs if keeps_texts else [None] * 5)
    assert [*read_predictions(store, "l", task="talk")["id"]] == ids[4:]
    assert read_predictions(store, "l", version="2").empty
    assert len(read_predictions(store, "l", since=found["time"][2])) == 3
    assert (SECRET.lower() in all_bytes(tmp_path).decode("latin-1").lower()) == keeps_texts


def test_off_writes_nothing_and_answers_are_the_same(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEAL_LOG_PREDICTIONS", raising=False)
    assert open_prediction_log(tmp_path, "l") is None
    found = []
    with logging_to(store, tmp_path) as log:
        for each in (None, log):
            with running(Champion(each), tmp_path / "log") as port:
                found.append(httpx.post(f"http://127.0.0.1:{port}/invocations", json=ROWS))
                if each is None:
                    refused = httpx.post(f"http://127.0.0.1:{port}/feedback", json=[])
                    assert refused.status_code == 409 and "DEAL_LOG_PREDICTIONS" in refused.text
                    assert not {"predictions", "feedback", "log"} & {path.name for path in tmp_path.iterdir()}
    plain, logged = (each.json()["predictions"] for each in found)
    assert [{name: row[name] for name in plain[0]} for row in logged] == plain
    assert {*logged[0]} - {*plain[0]} == {"id", "confidence"}
    for kept, keeps_texts in (("numbers", False), ("texts", True)):
        monkeypatch.setenv("DEAL_LOG_PREDICTIONS", kept)
        opened = open_prediction_log(tmp_path, "l")
        assert opened is not None and opened.keeps_texts == keeps_texts


def test_a_server_keeps_its_log_as_long_as_the_settings_say(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "DEAL_LOG_PREDICTIONS": "numbers",
        "DEAL_LOG_RETENTION_DAYS": "7",
        "DEAL_STORE_URI": str(tmp_path / "store"),
    }.items():
        monkeypatch.setenv(name, value)
    segments = {
        days: log_key("predictions", "l", f"{datetime.now(UTC) - timedelta(days=days):%Y%m%dT%H%M%S}-x")
        for days in (6, 20)
    }
    for key in segments.values():
        store.put_bytes(key, b"")
    log = open_prediction_log(tmp_path, "l")
    assert log is not None
    log.start()
    try:
        wait_until(lambda: {info.key for info in store.list("predictions/l")} == {segments[6]})
    finally:
        log.close()


KILLED = """
import sys, time
from pathlib import Path
from deal_core.evaluation.answering import InputRow
from infra.serving.prediction_log import PredictionLog
from infra.store.local import FileStore
from tests.served import Champion

home = Path(sys.argv[1])
log = PredictionLog(FileStore(home / "store"), home, "l", keeps_texts=False, retention_days=30)
log.start()
champion = Champion(log)
while True:
    print(*champion.ask([InputRow("a text", "bank")] * 3, lambda: False).ids, flush=True)
    time.sleep(0.001)
"""


@pytest.mark.nightly
def test_a_killed_server_loses_only_what_it_had_not_written(tmp_path: Path, store: FileStore) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        wait_until(lambda: len(all_bytes(tmp_path / "predictions").splitlines()) > 30)
        assert read_predictions(store, "l")["id"].is_unique, "a server that lives keeps its segment"
        assert not [*store.list("predictions")]
    finally:
        process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].split()
    (left,) = prediction_log(tmp_path, "l").segments()
    lines = left.read_bytes().split(b"\n")
    assert [json.loads(line)["id"] for line in lines[:-1]] == said[: len(lines) - 1], "an unbroken beginning"
    assert logging_module.WRITE_SECONDS < 1
    with left.open("ab") as file:
        file.write(b'{"id": "half a li')
    before = left.read_bytes()
    assert ship(store, prediction_log(tmp_path, "l"), everything=True) == 1 and not left.exists()
    left.write_bytes(before)  # as if it had been killed before it removed the segment
    for _ in range(2):
        assert [*read_predictions(store, "l")["id"]] == said[: len(lines) - 1]
    assert len([*store.list("predictions")]) == 1


def test_a_row_that_is_in_the_store_and_here_counts_once(tmp_path: Path, store: FileStore) -> None:
    log = prediction_log(tmp_path, "l")
    with logging_to(store, tmp_path) as writing:
        ids = ask(writing, "a", "b")
    (stored,) = log.stored(store)
    SegmentWriter(log).write(get_table(store, stored.key, log).to_pylist())  # as of a process that was killed
    assert [*read_predictions(store, "l")["id"]] == ids
    assert read_log(store, log, columns=["chars", "task"]) == read_log(store, log).select(["chars", "task"])
    assert len(log.segments()) == 1


def test_a_full_disk_fails_no_request_and_is_counted(tmp_path: Path, store: FileStore) -> None:
    """The limit of a file's size has the error of a full disk. It cuts the last line in half."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with logging_to(store, tmp_path) as log, running(Champion(log), tmp_path / "log") as port:
        url = f"http://127.0.0.1:{port}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            for _ in range(10):
                assert httpx.post(f"{url}/invocations", json=ROWS).is_success
            wait_until(lambda: log.num_dropped > 0 and log._queue.empty())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        figure = f"deal_predictions_dropped_total {float(log.num_dropped)}"
        assert figure in httpx.get(f"{url}/metrics").text
        last = httpx.post(f"{url}/invocations", json=ROWS).json()["predictions"]
    found = read_predictions(store, "l")
    assert {row["id"] for row in last} <= {*found["id"]}, "the log goes on when there is room"
    assert found["id"].is_unique and len(found) == 22 - log.num_dropped


def test_a_full_queue_and_a_dead_thread_drop_and_never_wait(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging_module, "MAX_QUEUED", 5)
    log = PredictionLog(store, "l", keeps_texts=False, retention_days=30)  # its threads never run
    asking = threading.Thread(target=lambda: [ask(log, "a text") for _ in range(8)], daemon=True)
    asking.start()
    asking.join(WAIT_SECONDS)
    assert not asking.is_alive() and log.num_dropped == 3
    with running(Champion(log), tmp_path / "log") as port:
        entry = [{"id": log._ids.new(), "label": "a"}]
        assert httpx.post(f"http://127.0.0.1:{port}/invocations", json=ROWS).is_success
        refused = httpx.post(f"http://127.0.0.1:{port}/feedback", json=entry)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "2"
    assert log.num_dropped == 5, "feedback that was refused is not lost"


def test_an_error_in_the_log_fails_no_request(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with logging_to(store, tmp_path) as log:
        monkeypatch.setattr(SegmentWriter, "write", fail)
        ask(log, "one")
        wait_until(lambda: log.num_dropped == 1)
        monkeypatch.undo()
        (second,) = ask(log, "two")
        monkeypatch.setattr(logging_module, "predictions_of", fail)
        assert ask(log, "three") == [] and log.num_dropped == 2
    assert [*read_predictions(store, "l")["id"]] == [second]


def test_a_writer_goes_on_when_its_segment_was_moved(tmp_path: Path, store: FileStore) -> None:
    segments = prediction_log(tmp_path, "l")
    with logging_to(store, tmp_path) as log:
        first = ask(log, "one")
        wait_until(lambda: any(path.stat().st_size for path in segments.segments()))
        assert ship(store, segments) == 0, "it is young"
        assert ship(store, segments, everything=True) == len([*store.list("predictions")]) == 1
        second = ask(log, "two")
    assert [*read_predictions(store, "l")["id"]] == [*first, *second]
    assert os.listdir(tmp_path / "predictions" / "l") == [], "the end of a server moves what it has written"


def test_no_row_goes_into_a_segment_that_is_moved_in_that_moment(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, flock = prediction_log(tmp_path, "l"), fcntl.flock
    writer = SegmentWriter(log)

    def ship_first(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        ship(store, log, everything=True)
        flock(file, how)

    for number in ("in a new segment", "in the present one", "in another new one"):
        monkeypatch.setattr(fcntl, "flock", ship_first)
        assert writer.write([{"id": number}]) == 0
    assert len({*read_predictions(store, "l")["id"]}) == 3


def test_old_and_large_segments_end(tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    log = prediction_log(tmp_path, "l")
    writer = SegmentWriter(log)
    for number, limit in enumerate(("SEGMENT_ROWS", "SEGMENT_SECONDS"), 1):
        writer.write([{"id": f"{number}"}])
        assert len(log.segments()) == number
        with monkeypatch.context() as patch:
            patch.setattr(log_segments, limit, 0)
            writer.write([{"id": f"{number} later"}])
    assert len(log.segments()) == 3
    monkeypatch.setattr(log_segments, "SEGMENT_SECONDS", -60)
    assert ship(store, log) == 3


def test_a_segment_that_cannot_be_opened_is_named(tmp_path: Path, store: FileStore) -> None:
    log = prediction_log(tmp_path, "l")
    log.folder.mkdir(parents=True)
    path = log.folder / "20260101T000000-0123456789ab.jsonl"
    path.symlink_to(path)  # as a file of another user, for a test that may run as root
    with pytest.raises(StoreError, match=r"0123456789ab.jsonl cannot be used .* as the user who runs deal serve"):
        ship(store, log)
    with pytest.raises(StoreError, match="cannot be used"):
        read_predictions(store, "l")


def test_a_server_removes_segments_beyond_the_retention_and_no_younger_ones(tmp_path: Path, store: FileStore) -> None:
    with logging_to(store, tmp_path) as log:
        ask(log, "a")
    (young,) = (info.key for info in store.list("predictions"))
    left = tmp_path / "predictions" / "l"
    for days in (29, 40):
        segment = f"{datetime.now(UTC) - timedelta(days=days):%Y%m%dT%H%M%S}-x"
        store.put_bytes(log_key("predictions", "l", segment), store.get_bytes(young))
    kept = {info.key for info in store.list("predictions")} - {log_key("predictions", "l", segment)}
    (left / f"{segment}.jsonl").write_text("left by a server that was killed")
    with logging_to(store, tmp_path):
        wait_until(lambda: {info.key for info in store.list("predictions")} == kept and not list(left.glob("*")))
    assert len(kept) == 2 and young in kept


@pytest.mark.parametrize("lineage", ["../../data", "..", "", "a/b", ".hidden"])
def test_a_log_is_no_other_folder(tmp_path: Path, store: FileStore, lineage: str) -> None:
    with pytest.raises(ConfigError, match="The lineage is"):
        PredictionLog(store, lineage, keeps_texts=False, retention_days=30)


def test_rows_that_wait_are_moved_before_a_row_is_forgotten(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path))
    monkeypatch.setattr(logging_module, "WRITE_SECONDS", 0.1)  # the wait is as long as for the usual half second
    with logging_to(store, tmp_path) as log:
        ids = ask(log, "a", "b")
        log.take_feedback([read_entry({"id": ids[0], "label": "a"}, "", source="api", now=1.0).feedback])
        ship_logs(store)
        assert len([*store.list("predictions")]) == len([*store.list("feedback")]) == 1
        digest = read_predictions(store, "l")["input_sha256"][0]
        forget_answers(store, "l", {digest})
    assert [*read_predictions(store, "l")["id"]] == ids[1:] and read_feedback(store, "l").empty


def test_feedback_goes_when_its_answer_is_gone(tmp_path: Path, store: FileStore) -> None:
    with logging_to(store, tmp_path) as log:
        (kept,) = ask(log, "a")
        for number, each in enumerate((kept, "e" * 32, "f" * 32)):
            log.take_feedback([read_entry({"id": each, "label": "a"}, "", source="api", now=float(number)).feedback])
    found = feedback_without_answer(store, "l", before=1.5)
    assert found == {"e" * 32}, "newer feedback may have its answer on another machine"
    remove_feedback(store, "l", found)
    assert {*read_feedback(store, "l")["id"]} == {kept, "f" * 32}


def test_feedback_is_taken_or_refused_as_a_whole(tmp_path: Path, store: FileStore) -> None:
    bank = {"input": "a", "task": "bank"}
    with logging_to(store, tmp_path / "elsewhere") as other:
        other._ids.share()
        of_another_server = other._ids.new()
    with logging_to(store, tmp_path, keeps_texts=True) as log, running(Champion(log), tmp_path / "log") as port:
        url = f"http://127.0.0.1:{port}"
        chat = {"input": json.dumps([{"role": "user", "content": "Hi"}]), "task": "talk"}
        asked = httpx.post(f"{url}/invocations", json={"dataframe_records": [bank, bank, bank, chat]}).json()
        right, wrong, thumb, talk = (row["id"] for row in asked["predictions"])

        def send(*entries: Any) -> httpx.Response:
            return httpx.post(f"{url}/feedback", json=[*entries])

        good = {"id": thumb, "is_right": False}
        for sentence, entry in {
            "Entry 2 has the label 'c', which the task does not have. Its labels are: a, b.": {
                "id": right,
                "label": "c",
            },
            "Entry 2 has no id of an answer, which is 32 hexadecimal digits.": {"id": "../x", "label": "a"},
            "Entry 2 has label and is_right; give one of label, answer, is_right.": {
                "id": right,
                "label": "a",
                "is_right": True,
            },
            "Entry 2 has no feedback; give one of label, answer, is_right.": {"id": right},
            "Entry 2 has the keys lable; the keys are id, label, answer, is_right, is_random, reviewer.": {
                "id": right,
                "lable": "a",
            },
            "Entry 2 gives a label, and the task has none; send answer.": {"id": talk, "label": "a"},
            "Entry 2 gives an answer as free text, and the task has labels; send label.": {"id": right, "answer": "a"},
            "Entry 2: is_right is neither true nor false.": {"id": right, "is_right": "maybe"},
            'Entry 2 is no object; send {"id": ID, "label": LABEL}.': 3,
            "Entry 2 names an id that no server of this lineage has given; leave it out.": {
                "id": "f" * 32,
                "label": "a",
            },
        }.items():
            refused = send(good, entry)
            assert (refused.status_code, refused.json()) == (400, {"error": sentence})
        taken = send(
            {"id": f"chatcmpl-{right}", "label": " A ", "is_random": True},
            {"id": wrong, "label": "b", "reviewer": "Jo"},
            {"id": wrong, "is_right": True},
            good,
            {"id": of_another_server, "label": "b"},
            {"id": talk, "answer": "Hello"},
        )
        assert (taken.status_code, taken.json()) == (202, {"taken": 6})
    found = read_feedback(store, "l")
    assert [*found.columns] == [each.name for each in fields(Feedback)]
    rows = {row.id: (row.label, row.is_right, row.is_random, row.reviewer) for row in found.itertuples()}
    assert rows == {
        right: ("a", True, True, None),
        wrong: ("b", False, False, "Jo"),
        thumb: (None, False, False, None),
        of_another_server: ("b", None, False, None),
        talk: ("Hello", False, False, None),
    }
    assert set(found["source"]) == {"api"} and not feedback_log(tmp_path, "l").segments()


def test_a_correction_keeps_a_row_in_the_random_sample(tmp_path: Path, store: FileStore) -> None:
    with logging_to(store, tmp_path) as log:
        wrong, free = (ids[0] for ids in (ask(log, "a"), ask(log, "b")))

        def say(now: float, **values: Any) -> None:
            assert log.take_feedback([read_entry(values, "", source="api", now=now).feedback])

        for each in (wrong, free, "f" * 32):
            say(1.0, id=each, is_right=False, is_random=True)
        say(2.0, id=wrong, label="b", reviewer="Jo")
        say(2.0, id="f" * 32, answer="Hello", reviewer="Jo")
        say(3.0, id=free, is_right=True)
    found = {row.id: row for row in read_feedback(store, "l").itertuples()}
    assert [(row.is_random, row.is_right) for row in found.values()] == [(True, False), (True, False), (True, True)]
    assert (found[wrong].label, found["f" * 32].label) == ("b", "Hello"), "the correction counts"


def test_feedback_has_a_bound(tmp_path: Path, store: FileStore) -> None:
    """Of ids that nobody gave nothing is kept, and of an answer some entries, however often a client sends them."""
    with logging_to(store, tmp_path) as log, running(Champion(log), tmp_path / "log") as port:
        (answer,) = ask(log, "a text")
        url, most = f"http://127.0.0.1:{port}/feedback", logging_module.MAX_ENTRIES_OF_ANSWER
        forged = answer[:-1] + ("0" if answer[-1] != "0" else "1")
        for entries in ([forged], [uuid.uuid4().hex] * 1000, [answer] * (most + 1)):
            refused = httpx.post(url, json=[{"id": each, "is_right": True} for each in entries])
            assert refused.status_code == 400 and "leave it out" in refused.text
        statuses = [httpx.post(url, json=[{"id": answer, "is_right": True}]).status_code for _ in range(most + 5)]
        assert statuses == [202] * most + [400] * 5
    assert len(read_log(store, feedback_log(tmp_path, "l"))) == most


def test_ids_of_earlier_servers_are_known_and_those_of_other_lineages_are_not(tmp_path: Path, store: FileStore) -> None:
    with logging_to(store, tmp_path) as log:
        (earlier,) = ask(log, "a text")
    with logging_to(store, tmp_path / "another machine") as log:
        assert log.refusal_of([earlier]) is None
    stranger = AnswerIds(store, "m")
    stranger.share()
    assert not stranger.is_given(earlier) and not log._ids.is_given(stranger.new())
    assert {store.get_bytes(f"serving/{name}.key") for name in "lm"} != {store.get_bytes("serving/l.key")}


def test_a_server_that_starts_without_the_store_knows_its_own_ids(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bool:
        raise StoreError("the store is away")

    monkeypatch.setattr(logging_module, "SHIP_SECONDS", 0.05)
    monkeypatch.setattr(store, "put_bytes", fail)
    with logging_to(store, tmp_path) as log:
        (before,) = ask(log, "a text")
        assert log.refusal_of([before]) is None and log.refusal_of(["0" * 32]) is not None
        monkeypatch.undo()
        monkeypatch.setattr(logging_module, "SHIP_SECONDS", 0.05)
        wait_until(lambda: store.exists("serving/l.key") and log._ids._is_shared)
        (after,) = ask(log, "a text")
        assert log.refusal_of([before, after]) is None
    known = AnswerIds(store, "l")
    known.share()
    assert known.is_given(after) and not known.is_given(before)


def test_a_log_of_numbers_takes_no_text_as_feedback(tmp_path: Path, store: FileStore) -> None:
    with logging_to(store, tmp_path) as log, running(Champion(log), tmp_path / "log", api_key="k") as port:
        entry = [{"id": "0" * 32, "answer": SECRET}]
        url = f"http://127.0.0.1:{port}/feedback"
        assert httpx.post(url, json=entry).status_code == 401
        refused = httpx.post(url, json=entry, headers={"Authorization": "Bearer k"})
        assert refused.status_code == 400 and "keeps no texts" in refused.text


def test_columns_of_a_rollout_are_empty_in_segments_of_earlier_releases(tmp_path: Path, store: FileStore) -> None:
    with logging_to(store, tmp_path) as log:
        ask(log, "a")
    log_of_l = prediction_log(tmp_path, "l")
    (info,) = log_of_l.stored(store)
    earlier = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(store.get_bytes(info.key))).select([*COLUMNS]), earlier)
    store.put_bytes(info.key, earlier.getvalue())
    with logging_to(store, tmp_path) as log:
        (returned,) = ask(log, "a")
        rows = [InputRow("b", "bank")]
        log.note(rows, Champion().ask(rows, lambda: False), 0.25, [returned])
        log.note_failure(rows, Champion.served, "4", 0.25)
        assert log.task_of(returned) == "bank"
    assert len(read_predictions(store, "l")) == 2, "of both segments"
    found = read_predictions(store, "l", of_rollout=True)
    assert [*found["shadow_of"]] == [None, None, returned, None] and [*found["is_failed"]] == [None, None, None, True]
    forget_answers(store, "l", {*found["input_sha256"]})
    assert read_predictions(store, "l", of_rollout=True).empty, "copies are forgotten too"


def test_a_table_without_the_columns_of_a_log_is_named(tmp_path: Path, store: FileStore) -> None:
    """Read as empty rows, it would hide the answers that deal forget has to delete."""
    with logging_to(store, tmp_path) as log:
        ask(log, "a")
    (info,) = prediction_log(tmp_path, "l").stored(store)
    other = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(store.get_bytes(info.key))).drop_columns(["input_sha256"]), other)
    store.put_bytes(info.key, other.getvalue())
    with pytest.raises(StoreError, match="is no segment of a log; move it elsewhere"):
        forget_answers(store, "l", {"0" * 64})
