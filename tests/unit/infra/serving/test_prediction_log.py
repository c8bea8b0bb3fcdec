"""The prediction log loses no row that it has written, counts none twice, and never fails a request."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow.parquet as pq
import pytest

from deal_core.data.rows import stored_input_digest
from deal_core.errors import ConfigError, StoreError
from deal_core.evaluation.answering import InputRow
from deal_core.monitoring.feedback import Feedback, read_entry
from deal_core.monitoring.predictions import COLUMNS, ROLLOUT_COLUMNS, Prediction
from infra.deleted_inputs import keep_deleted, read_deleted
from infra.log_batches import Log, put_rows, read_log
from infra.predictions import (
    PREDICTION_SCHEMA,
    feedback_log,
    forget_answers,
    read_feedback,
    read_predictions,
)
from infra.serving import prediction_log as logging_module
from infra.serving.prediction_log import PredictionLog, open_prediction_log
from infra.store.keys import log_key
from infra.store.local import FileStore
from tests.served import WAIT_SECONDS, Champion, running
from tests.waiting import wait_for

SECRET = "Zanzibar"
LOGS = ("predictions", "feedback")
ROWS = {"dataframe_records": [{"input": f"the {SECRET} text", "task": "bank"}, {"input": " A ", "task": None}]}


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


@contextmanager
def logging_to(store: FileStore, *, keeps_texts: bool = False) -> Iterator[PredictionLog]:
    log = PredictionLog(store, "l", keeps_texts=keeps_texts, retention_days=30)
    log.start()
    try:
        yield log
    finally:
        log.close()


def ask(log: PredictionLog, *texts: str) -> list[str]:
    return [*asyncio.run(Champion(log).ask([InputRow(text, "bank") for text in texts])).ids]


def say(log: PredictionLog, now: float, **values: Any) -> None:
    assert log.take_feedback([read_entry(values, "", source="api", now=now).feedback])


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
        logging_to(store, keeps_texts=keeps_texts) as log,
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


def test_a_deleted_input_is_never_stored_as_a_text_again(tmp_path: Path, store: FileStore) -> None:
    """A running server sees a deletion before its next batch. The answer still counts, without its texts."""
    deleted = f"the {SECRET} text"
    digest = stored_input_digest("labelled", deleted).hex()
    with logging_to(store, keeps_texts=True) as log:
        ask(log, "before")
        wait_for(lambda: len(read_predictions(store, "l")) == 1)
        keep_deleted(store, "bank", "0" * 64, [digest])
        ask(log, deleted, f" the  {SECRET} text", f"{SECRET} of nobody")
    found = read_predictions(store, "l")
    assert [*found["input"]] == ["before", None, None, f"{SECRET} of nobody"]
    assert [text is None for text in found["output"]] == [False, True, True, False]
    assert [*found["input_sha256"]].count(digest) == 2 and deleted.encode() not in all_bytes(tmp_path)
    forget_answers(store, "l", read_deleted(store, "bank", ["0" * 64]))
    assert len(read_predictions(store, "l")) == 2


def test_off_writes_nothing_and_answers_are_the_same(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEAL_LOG_PREDICTIONS", raising=False)
    assert open_prediction_log(store, "l") is None
    found = []
    with logging_to(store) as log:
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
        opened = open_prediction_log(store, "l")
        assert opened is not None and opened.keeps_texts == keeps_texts


def test_a_server_keeps_its_logs_as_long_as_the_settings_say(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_LOG_PREDICTIONS", "numbers")
    monkeypatch.setenv("DEAL_LOG_RETENTION_DAYS", "7")
    now = datetime.now(UTC)
    batches = {(log, days): log_key(log, "l", now - timedelta(days)) for log in LOGS for days in (6, 20)}
    for key in batches.values():
        store.put_bytes(key, b"")
    log = open_prediction_log(store, "l")
    assert log is not None
    log.start()
    try:
        kept = {batches[log, 6] for log in LOGS}
        wait_for(lambda: {info.key for log in LOGS for info in store.list(f"{log}/l")} == kept)
    finally:
        log.close()


KILLED = """
import asyncio, sys, time
from pathlib import Path
from deal_core.evaluation.answering import InputRow
from infra.serving import prediction_log
from infra.store.local import FileStore
from tests.served import Champion

prediction_log.BATCH_SECONDS = 0.1
log = prediction_log.PredictionLog(FileStore(Path(sys.argv[1])), "l", keeps_texts=False, retention_days=30)
log.start()
champion = Champion(log)
while True:
    print(*asyncio.run(champion.ask([InputRow("a text", "bank")] * 3)).ids, flush=True)
    time.sleep(0.001)
"""


@pytest.mark.nightly
def test_a_killed_server_loses_only_the_rows_that_waited(tmp_path: Path, store: FileStore) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said: list[str] = []
    reading = threading.Thread(
        target=lambda: said.extend(word for line in process.stdout or () for word in line.split())
    )
    reading.start()
    try:
        wait_for(lambda: len([*store.list("predictions")]) >= 3)
    finally:
        process.send_signal(signal.SIGKILL)
        reading.join(WAIT_SECONDS)
        process.wait()
    found = [*read_predictions(store, "l")["id"]]
    assert found and found == said[: len(found)], "an unbroken beginning"


def test_while_the_disk_is_full_every_request_is_answered_and_rows_wait(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging_module, "BATCH_SECONDS", 0.05)
    monkeypatch.setattr(logging_module, "MAX_WAITING", 12)
    ids: list[str] = []
    with logging_to(store) as log, running(Champion(log), tmp_path / "log") as port:
        url = f"http://127.0.0.1:{port}"

        def invoke() -> None:
            answer = httpx.post(f"{url}/invocations", json=ROWS)
            ids.extend(row["id"] for row in answer.raise_for_status().json()["predictions"])

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the error is that of a full disk
        try:
            for _ in range(8):
                invoke()
            wait_for(lambda: log._is_failing)
            entry = [{"id": ids[0], "label": "a"}]
            refused = httpx.post(f"{url}/feedback", json=entry)
            assert refused.status_code == 503 and refused.headers["Retry-After"] == "2"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert httpx.post(f"{url}/feedback", json=entry).status_code == 202
        assert len(read_feedback(store, "l")) == 1, "it is stored when the client has its answer"
        assert "deal_predictions_dropped_total 4.0" in httpx.get(f"{url}/metrics").text
        wait_for(lambda: not log._waiting)
        invoke()
    found = [*read_predictions(store, "l")["id"]]
    assert found == [*ids[:12], *ids[16:]], "what had room was waiting, and the log goes on"


def test_a_dead_thread_drops_and_never_waits(tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging_module, "MAX_WAITING", 5)
    log = PredictionLog(store, "l", keeps_texts=False, retention_days=30)  # its thread never runs
    asking = threading.Thread(target=lambda: [ask(log, "a text") for _ in range(8)], daemon=True)
    asking.start()
    asking.join(WAIT_SECONDS)
    assert not asking.is_alive() and log.num_dropped == 3
    with running(Champion(log), tmp_path / "log") as port:
        assert httpx.post(f"http://127.0.0.1:{port}/invocations", json=ROWS).is_success
        log.close()
        assert log.num_dropped == 5
        assert "5 answers are missing in the prediction log" in (tmp_path / "log").read_text()


def test_feedback_that_hangs_in_the_store_takes_no_place_of_an_answer(
    tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging_module, "MAX_STORING", 2)
    is_back, put = threading.Event(), put_rows
    num_hanging: list[int] = []

    def hang(to: FileStore, log: Log, rows: Any) -> None:
        if log.name == "feedback":
            num_hanging.append(1)
            assert is_back.wait(WAIT_SECONDS)
        put(to, log, rows)

    with logging_to(store) as log, running(Champion(log), tmp_path / "log") as port, ThreadPoolExecutor() as clients:
        (answer,) = ask(log, "a text")
        url, entry = f"http://127.0.0.1:{port}", [{"id": answer, "is_right": True}]
        monkeypatch.setattr(logging_module, "put_rows", hang)
        hanging = [clients.submit(httpx.post, f"{url}/feedback", json=entry, timeout=WAIT_SECONDS) for _ in range(2)]
        wait_for(lambda: len(num_hanging) >= 2)
        assert httpx.post(f"{url}/feedback", json=entry).status_code == 503
        assert httpx.post(f"{url}/invocations", json=ROWS).is_success
        is_back.set()
        assert [each.result().status_code for each in hanging] == [202, 202]
    assert len(read_log(store, feedback_log("l"))) == 2


def test_many_rows_do_not_wait_for_the_clock(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging_module, "BATCH_SECONDS", 3600.0)
    monkeypatch.setattr(logging_module, "MAX_WAITING", 9)
    with logging_to(store) as log:
        for _ in range(3):
            ask(log, *"abcdefg")
            wait_for(lambda: not log._waiting)
    assert log.num_dropped == 0 and len(read_predictions(store, "l")) == 21


def test_an_error_in_the_log_fails_no_request(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(logging_module, "BATCH_SECONDS", 0.05)
    with logging_to(store) as log:
        monkeypatch.setattr(logging_module, "put_rows", fail)
        ask(log, "one")
        wait_for(lambda: log.num_dropped == 1 and not log._waiting)
        monkeypatch.setattr(logging_module, "put_rows", put_rows)
        (second,) = ask(log, "two")
        monkeypatch.setattr(logging_module, "predictions_of", fail)
        assert ask(log, "three") == [] and log.num_dropped == 2
    assert [*read_predictions(store, "l")["id"]] == [second]


@pytest.mark.parametrize("lineage", ["../../data", "..", "", "a/b", ".hidden"])
def test_a_log_is_no_other_folder(store: FileStore, lineage: str) -> None:
    with pytest.raises(ConfigError, match="The lineage is"):
        PredictionLog(store, lineage, keeps_texts=False, retention_days=30)


def test_answers_are_forgotten_with_their_feedback(store: FileStore) -> None:
    with logging_to(store) as log:
        ids = ask(log, "a", "b")
        say(log, 1.0, id=ids[0], label="a")
    forget_answers(store, "l", {read_predictions(store, "l")["input_sha256"][0]})
    assert [*read_predictions(store, "l")["id"]] == ids[1:] and read_feedback(store, "l").empty
    forget_answers(store, "l", {*read_predictions(store, "l")["input_sha256"]})
    assert not [*store.list("predictions"), *store.list("feedback")], "no empty batch stays"


def test_feedback_is_taken_or_refused_as_a_whole(tmp_path: Path, store: FileStore) -> None:
    bank = {"input": "a", "task": "bank"}
    unknown = "f" * 32
    with logging_to(store, keeps_texts=True) as log, running(Champion(log), tmp_path / "log") as port:
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
        }.items():
            refused = send(good, entry)
            assert (refused.status_code, refused.json()) == (400, {"error": sentence})
        taken = send(
            {"id": f"chatcmpl-{right}", "label": " A ", "is_random": True},
            {"id": wrong, "label": "b", "reviewer": "Jo"},
            {"id": wrong, "is_right": True},
            good,
            {"id": unknown, "label": "b"},
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
        unknown: ("b", None, False, None),
        talk: ("Hello", False, False, None),
    }
    assert set(found["source"]) == {"api"}


def test_a_correction_keeps_a_row_in_the_random_sample(store: FileStore) -> None:
    with logging_to(store) as log:
        wrong, free = (ids[0] for ids in (ask(log, "a"), ask(log, "b")))
        for each in (wrong, free, "f" * 32):
            say(log, 1.0, id=each, is_right=False, is_random=True)
        say(log, 2.0, id=wrong, label="b", reviewer="Jo")
        say(log, 2.0, id="f" * 32, answer="Hello", reviewer="Jo")
        say(log, 3.0, id=free, is_right=True)
    found = {row.id: row for row in read_feedback(store, "l").itertuples()}
    assert [(row.is_random, row.is_right) for row in found.values()] == [(True, False), (True, False), (True, True)]
    assert (found[wrong].label, found["f" * 32].label) == ("b", "Hello"), "the correction counts"


def test_a_server_that_starts_without_the_store_says_so_once_and_stores_later(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_tries: list[int] = []

    def fail(*_: Any, **__: Any) -> bool:
        num_tries.append(1)
        raise StoreError("the store is away")

    monkeypatch.setattr(logging_module.LOG, "handlers", [caplog.handler])
    monkeypatch.setattr(logging_module.LOG, "propagate", False)

    monkeypatch.setattr(logging_module, "BATCH_SECONDS", 0.05)
    monkeypatch.setattr(store, "put_bytes", fail)
    with logging_to(store) as log:
        ids = ask(log, "a text")
        wait_for(lambda: len(num_tries) > 2)
        assert caplog.messages == ["The prediction log: the store is away"]
        monkeypatch.delattr(store, "put_bytes")
    assert [*read_predictions(store, "l")["id"]] == ids


def test_a_log_of_numbers_takes_no_text_as_feedback(tmp_path: Path, store: FileStore) -> None:
    with logging_to(store) as log, running(Champion(log), tmp_path / "log", api_key="k") as port:
        entry = [{"id": "0" * 32, "answer": SECRET}]
        url = f"http://127.0.0.1:{port}/feedback"
        assert httpx.post(url, json=entry).status_code == 401
        refused = httpx.post(url, json=entry, headers={"Authorization": "Bearer k"})
        assert refused.status_code == 400 and "keeps no texts" in refused.text


def test_rows_of_a_rollout_are_read_when_they_are_asked_for(store: FileStore) -> None:
    with logging_to(store) as log:
        (returned,) = ask(log, "a")
        rows = [InputRow("b", "bank")]
        log.note(rows, asyncio.run(Champion().ask(rows)), 0.25, [returned])
        log.note_failure(rows, Champion.served, "4", 0.25)
        assert log.task_of(returned) == "bank"
    assert [*read_predictions(store, "l")["id"]] == [returned]
    found = read_predictions(store, "l", of_rollout=True)
    assert [*found["shadow_of"]] == [None, returned, None] and [*found["is_failed"]] == [None, None, True]
    forget_answers(store, "l", {*found["input_sha256"]})
    assert read_predictions(store, "l", of_rollout=True).empty, "copies are forgotten too"
