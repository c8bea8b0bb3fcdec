"""The candidate of one server: who it answers, what happens where it fails, and what is copied to a shadow."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from deal_core.errors import AdapterStateError, ConfigError
from deal_core.evaluation.answerer import Answered, GivenUpError, Sampling
from deal_core.evaluation.answering import InputRow
from deal_core.evaluation.generation import Confidence
from deal_core.judging_config import RolloutKind, RolloutTerms
from infra.predictions import read_predictions
from infra.serving import prediction_log
from infra.serving import rollout as serving
from infra.serving.champion import Champion
from infra.serving.formats import Caller, HttpAnswer, RefusalError
from infra.serving.openai_api import complete
from infra.serving.prediction_log import PredictionLog
from infra.serving.rollout import Rollout, Trial, with_tasks
from infra.serving.version_files import SERVED_FILES
from infra.store.local import FileStore
from infra.versions import Version
from tests.served import TASKS, WAIT_SECONDS
from tests.served import Champion as Served
from tests.stored_versions import store_version
from tests.waiting import wait_for

ROWS = [InputRow("a", "bank")]
_Result = TypeVar("_Result")


class Answerer:
    """Two versions: the champion answers in capitals, the candidate not, unless they are told otherwise."""

    served = Served.served
    retry_seconds = 60.0

    def __init__(self) -> None:
        self.version = "1"
        self.answer_of_champion: Callable[[str], str] = str.upper
        self.answer: Callable[[str], str] = lambda text: text
        self.candidate: str | None = None
        self.is_damaged = False
        self.may_answer = threading.Event()
        self.may_answer.set()

    def add_candidate(self, folder: Path, version: str) -> None:
        if self.is_damaged:
            raise AdapterStateError("the files are damaged.")
        self.candidate = version

    def drop_candidate(self) -> None:
        self.candidate = None

    def stop(self) -> None: ...

    async def reply(
        self,
        rows: Sequence[InputRow],
        *,
        by_candidate: bool = False,
        in_background: bool = False,
        sampling: Sampling | None = None,
    ) -> Answered:
        assert by_candidate or not in_background
        if by_candidate and self.candidate is None:
            raise GivenUpError("gone")
        while in_background and not self.may_answer.is_set():
            await asyncio.sleep(0.01)
        answers = [*map(self.answer if by_candidate else self.answer_of_champion, [row.input for row in rows])]
        version = str(self.candidate) if by_candidate else self.version
        return Answered(answers, self.served, version, [Confidence(0.5, 0.5)] * len(rows))


def in_rollout(store: FileStore, kind: RolloutKind = "canary", share: float = 0.5) -> Version:
    """Version 2, which continues the champion and is tried."""
    files = dict.fromkeys(SERVED_FILES, b"{}")
    champion = store_version(store, files)
    terms = RolloutTerms(kind, share, 200, 10.0, 0.95)
    return store_version(store, files, parent_version=champion.version, rollout=terms)


class Server:
    """A champion with a rollout, and its log."""

    def __init__(self, store: FileStore, log: PredictionLog | None, candidate: Version) -> None:
        self.candidate: Version | None = candidate
        self.answerer, self.said, self.loop = Answerer(), list[str](), asyncio.new_event_loop()
        self.champion = Champion(store, "l", self.said.append, log)
        self.champion._answerer = self.answerer  # type: ignore[assignment]
        self.rollout = Rollout(store, self.answerer, log, self.said.append)  # type: ignore[arg-type]
        self.champion.rollout = self.rollout

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the event loop in a thread."""
        thread = threading.Thread(target=self.loop.run_forever)
        thread.start()
        try:
            yield
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            thread.join(WAIT_SECONDS)
            self.loop.close()

    def keep_up(self) -> None:
        self.rollout.keep_up(self.candidate, "1")

    async def copies_end(self) -> None:
        await asyncio.gather(*self.rollout._copies)

    def ask(self, rows: Sequence[InputRow] = ROWS, key: str | None = None, version: str | None = None) -> Answered:
        return self.run(self.champion.ask(rows, key, version))

    def run(self, asking: Coroutine[Any, Any, _Result]) -> _Result:
        """Let the event loop of the server do something."""
        return asyncio.run_coroutine_threadsafe(asking, self.loop).result(WAIT_SECONDS)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path))
    monkeypatch.setattr(prediction_log, "BATCH_SECONDS", 0.05)
    return FileStore(tmp_path / "store")


@contextmanager
def logged(store: FileStore, candidate: Version) -> Iterator[Server]:
    log = PredictionLog(store, "l", keeps_texts=True, retention_days=30)
    log.start()
    server = Server(store, log, candidate)
    try:
        with server.running():
            yield server
            server.champion.stop()
            server.run(server.copies_end())
    finally:
        log.close()


def rows_of(store: FileStore) -> list[dict[str, Any]]:
    return read_predictions(store, "l", of_rollout=True).to_dict("records")  # type: ignore[return-value]


def test_a_share_of_the_keys_goes_to_the_canary_and_always_the_same_ones() -> None:
    trial, later = Trial("2", "canary", 0.1), Trial("3", "canary", 0.1)
    keys = [f"user {number}" for number in range(10_000)]
    taken = [key for key in keys if trial.takes(key)]
    assert 850 < len(taken) < 1150 and all(trial.takes(key) for key in taken)
    assert not {*taken} <= {key for key in keys if later.takes(key)}, "each version has its own users"
    assert all(Trial("2", "shadow", 1.0).takes(key) for key in keys)
    wider = Trial("2", "canary", 0.5)
    assert all(wider.takes(key) for key in taken), "who was among a share is among a larger one"


def test_a_canary_answers_its_users_and_the_names_that_ask_for_it(store: FileStore) -> None:
    with logged(store, in_rollout(store)) as server:
        assert server.ask().version == "1" and server.champion.canary is None
        server.keep_up()
        assert server.champion.canary == "2" and server.champion.state()["rollout"] == {
            "version": "2",
            "kind": "canary",
            "share": 0.5,
            "problem": None,
        }
        by_key = {f"u{number}": server.ask(key=f"u{number}").version for number in range(40)}
        assert {*by_key.values()} == {"1", "2"}
        assert all(server.ask(key=key).version == version for key, version in by_key.items())
        by_text = {text: server.ask([InputRow(text, "bank")]).version for text in map(str, range(40))}
        assert {*by_text.values()} == {"1", "2"}, "without a key the request itself decides"
        assert {server.ask(key=key, version="2").version for key in by_key} == {"2"}
        assert {server.ask(key=key, version="1").version for key in by_key} == {"1"}
        assert server.ask([InputRow("a")], version="2").served is Served.served
        server.candidate = None
        server.keep_up()
        assert {server.ask(key=key).version for key in by_key} == {"1"} and server.champion.canary is None
    versions = [row["version"] for row in rows_of(store)]
    assert len(versions) == 1 + 40 * 6 + 1 and {*versions} == {"1", "2"}


def broken(text: str) -> str:
    raise RuntimeError("no answer")


def refusing(text: str) -> str:
    raise ConfigError("The base model's chat template cannot write a chat of task talk.")


@pytest.mark.parametrize("failing", [broken, refusing])
def test_where_a_canary_fails_the_champion_answers_and_the_log_counts_it(
    store: FileStore, failing: Callable[[str], str]
) -> None:
    with logged(store, in_rollout(store, share=1.0)) as server:
        server.keep_up()
        server.answerer.answer = failing
        found = server.ask()
        assert (found.version, found.answers) == ("1", ["A"])
    failed, answered = sorted(rows_of(store), key=lambda row: str(row["version"]), reverse=True)
    assert (failed["version"], failed["is_failed"], failed["input"]) == ("2", True, None)
    assert (answered["version"], answered["is_failed"]) == ("1", None)
    assert [*read_predictions(store, "l")["version"]] == ["1"]


def test_a_request_that_both_versions_refuse_counts_for_neither(store: FileStore) -> None:
    with logged(store, in_rollout(store, share=1.0)) as server:
        server.keep_up()
        server.answerer.answer = server.answerer.answer_of_champion = refusing
        with pytest.raises(ConfigError, match="chat template"):
            server.ask()
        server.answerer.answer_of_champion = broken
        with pytest.raises(RuntimeError):
            server.ask()
    rows = {(row["version"], row["is_failed"]) for row in rows_of(store)}
    assert rows == {("1", True), ("2", True)} and len(rows_of(store)) == 2, "of the second request alone"


def test_a_shadow_that_refuses_what_the_champion_has_answered_has_failed(store: FileStore) -> None:
    with logged(store, in_rollout(store, "shadow", 1.0)) as server:
        server.keep_up()
        server.answerer.answer = refusing
        (returned,) = server.ask().ids
        wait_for(lambda: [row for row in rows_of(store) if row["is_failed"]])
    failed = [row for row in rows_of(store) if row["is_failed"]]
    assert [(row["version"], row["shadow_of"]) for row in failed] == [("2", returned)]


def complete_with(server: Server, model: str) -> HttpAnswer:
    """POST /v1/completions, without HTTP."""
    body = json.dumps({"model": model, "prompt": "a"}).encode()
    caller = Caller(None, lambda version, events: asyncio.sleep(0))
    return server.run(complete(server.champion, body, caller, is_chat=False))


def test_no_other_version_answers_for_the_canary_that_a_request_names(store: FileStore) -> None:
    def exchanged(text: str) -> str:
        server.answerer.candidate = "3"
        return text

    with logged(store, in_rollout(store)) as server:
        server.keep_up()
        assert complete_with(server, "l@2").version == "2"
        for answer, status in ((broken, 500), (refusing, 400), (exchanged, 503)):
            server.answerer.answer = answer
            with pytest.raises(RefusalError) as refusal:
                complete_with(server, "l@2")
            assert refusal.value.status == status
    rows = [(row["version"], row["is_failed"]) for row in rows_of(store)]
    assert rows == [("2", None), ("2", True)], "no row of an answer that nobody got"


def test_an_answer_of_a_champion_that_has_moved_is_not_logged(store: FileStore) -> None:
    def moved(text: str) -> str:
        server.answerer.version = "7"
        return text

    with logged(store, in_rollout(store, "shadow", 1.0)) as server:
        server.keep_up()
        server.answerer.answer_of_champion = moved
        with pytest.raises(RefusalError, match="Version 1 does not answer here; version 7 does") as refusal:
            complete_with(server, "l@1")
        assert refusal.value.status == 404
        assert complete_with(server, "l").version == "7"
    assert [row["version"] for row in rows_of(store) if not row["shadow_of"]] == ["7"]


def test_a_shadow_answers_copies_and_what_it_cannot_do_is_dropped(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MAX_COPIES", 2)
    with logged(store, in_rollout(store, "shadow", 1.0)) as server:
        server.keep_up()
        server.answerer.may_answer.clear()
        found = [server.ask() for _ in range(6)]
        assert {each.version for each in found} == {"1"} and server.champion.canary is None
        num_dropped = server.rollout.num_dropped
        assert 3 <= num_dropped <= 4, "one or none is with the shadow, two wait"
        server.answerer.may_answer.set()
        wait_for(lambda: len([row for row in rows_of(store) if row["shadow_of"]]) >= 6 - num_dropped)
    rows = rows_of(store)
    copies = [row for row in rows if row["shadow_of"]]
    assert {row["version"] for row in copies} == {"2"} and {row["output"] for row in copies} == {"a"}
    assert {row["shadow_of"] for row in copies} <= {row["id"] for row in rows if row["version"] == "1"}
    assert [*read_predictions(store, "l")["version"]] == ["1"] * 6


def test_a_version_is_tried_only_where_it_may_be_and_can_be_judged(store: FileStore) -> None:
    candidate = in_rollout(store)
    unlogged = Server(store, None, candidate)
    unlogged.keep_up()
    unlogged.keep_up()
    with unlogged.running():
        assert unlogged.answerer.candidate is None and unlogged.ask().version == "1"
    assert unlogged.said == ["Version 2 is not tried: its rollout needs DEAL_LOG_PREDICTIONS."]
    for changes in ({"rollout": None}, {"parent_version": "0"}):
        with logged(store, candidate.model_copy(update=changes)) as server:
            server.keep_up()
            assert server.answerer.candidate is None and server.champion.canary is None, changes


def test_a_damaged_file_of_the_candidate_is_named_and_the_champion_serves(store: FileStore) -> None:
    candidate = in_rollout(store)
    store.put_bytes(f"{candidate.adapter_uri}/adapter_model.safetensors", b"other bytes")
    with logged(store, candidate) as server:
        server.keep_up()
        (problem,) = server.said
        assert problem.startswith("Version 2 does not load for its rollout: Version 2 of 'l' is damaged")
        assert "adapter_model.safetensors has sha256" in problem
        assert server.answerer.candidate is None and server.ask().version == "1"


def test_a_version_that_does_not_load_is_told_once_and_the_champion_serves(store: FileStore) -> None:
    with logged(store, in_rollout(store)) as server:
        server.answerer.is_damaged = True
        server.keep_up()
        server.keep_up()
        assert server.said == ["Version 2 does not load for its rollout: the files are damaged."]
        assert "does not load" in server.champion.state()["rollout"]["problem"] and server.ask().version == "1"


def test_a_row_without_a_task_means_the_champions_newest_task() -> None:
    rows = with_tasks([InputRow("a"), InputRow("b", "talk")], Served.served)
    assert [row.task for row in rows] == [TASKS[0].name, "talk"]


def test_a_task_that_only_the_candidate_knows_is_not_the_canarys(store: FileStore) -> None:
    with logged(store, in_rollout(store, share=1.0)) as server:
        server.keep_up()
        assert server.ask(ROWS, key="a").version == "2"
        assert server.ask([InputRow("a", "new")], key="a").version == "1", "which refuses a task that it does not know"
