"""The outcome of an arrival whose run fails."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from deal_core.errors import ConfigError, StoreError, TrainingDivergedError
from flows.watch import InboxWorker, watch
from infra.store.base import ObjectStore
from infra.store.local import open_store
from infra.versions import Versions
from tasks.inbox import Handled, list_arrivals, look, read_state
from tasks.lineage.settings import WatchedLineage, add_lineage, hold_lineage_file
from tasks.spec import parse
from tasks.waiting import Due
from tests.stored_versions import move, store_version


async def none_cancelled(*args: Any) -> tuple[str, ...]:
    """In the place of a question to a server, if there is one."""
    return ()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is announced of arrivals that no adaptation began for."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr("flows.watch.announce_failure", lambda *given: found.append(given))
    return found


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Handle one arrival of lineage 'l', whose run ends with an error."""

    def handle(error: Exception) -> Handled:
        async def fail(*args: Any) -> None:
            raise error

        monkeypatch.setattr("flows.watch.adapt_locked", fail)
        store = open_store(str(tmp_path))
        store.put_bytes("inbox/bank/a.csv", b"text,label\na,b\n")
        (info,) = list_arrivals(store.list("inbox"))
        worker = InboxWorker(store, WatchedLineage(lineage="l"), settle_seconds=0, once=True, wait=True)
        asyncio.run(worker._handle(Due((info,)), look(store)))
        handled = read_state(store, "l").files[info.key]
        assert worker.runs == [] and handled.outcome == "failed"
        return handled

    return handle


def test_a_training_that_diverged_is_not_tried_again_and_says_what_to_do(failing: Any) -> None:
    handled = failing(TrainingDivergedError("The training diverged. Lower train.learning_rate."))
    assert handled.due() is None
    assert handled.message.startswith("The training diverged. Lower train.learning_rate. It is not tried again")
    assert "deal adapt SPEC --watch --once --lineage l" in handled.message


def test_any_other_failure_is_tried_again(failing: Any, told: list[tuple[Any, ...]]) -> None:
    assert failing(ConfigError("train.num_processes is 9.")).due() is not None
    assert told == [], "the adaptation itself has announced it"


def test_a_task_file_that_cannot_be_read_is_announced(
    failing: Any, told: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = StoreError("The store does not answer.")

    def away(*args: Any) -> None:
        raise error

    monkeypatch.setattr("flows.watch.task_spec", away)
    handled = failing(AssertionError("no adaptation begins"))
    assert handled.message == str(error) and handled.due() is not None
    assert told == [("l", "bank", error)]


def test_one_call_tries_a_failed_file_once_while_another_file_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    async def fail(*args: Any) -> None:
        tried.append("a.csv")
        raise StoreError("The hub does not answer.")

    monkeypatch.setattr("flows.watch.adapt_locked", fail)
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    store = open_store(str(tmp_path))
    store.put_bytes("inbox/bank/a.csv", b"text,label\na,b\n")
    os.utime(tmp_path / "inbox/bank/a.csv", (0, 0))
    spec = WatchedLineage(lineage="l")

    def looks() -> int:
        worker = InboxWorker(store, spec, settle_seconds=60, once=True, wait=True)
        for number in range(3):
            store.put_bytes("inbox/bank/growing.csv", b"text,label\n" * (number + 1))
            asyncio.run(worker.handle_open())
            assert worker.num_left == 1
        return len(tried)

    assert looks() == 1
    assert looks() == 2, "the next call tries it again at once"


def test_a_watch_waits_while_its_lineage_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[object] = []
    ends: list[bool] = []

    async def learn(*args: Any) -> None:
        learned.append(hold_lineage_file(store, "l", "enough"))
        raise ConfigError("It was tried, which is all that counts here.")

    monkeypatch.setattr("flows.watch.adapt_locked", learn)
    monkeypatch.setattr("flows.watch.is_stopped", lambda: bool(ends))
    monkeypatch.setattr(InboxWorker, "_hold_cancelled", none_cancelled)
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    store = open_store(str(tmp_path / "store"))
    monkeypatch.setattr("flows.watch.current_store", lambda: store)
    add_lineage(store, parse(WatchedLineage, {"lineage": "l"}, "test"))
    hold_lineage_file(store, "l", "the labels are being corrected")
    store.put_bytes("inbox/bank/a.csv", b"text,label\na,b\n")

    async def hold_and_resume() -> None:
        watching = asyncio.create_task(watch.fn(WatchedLineage(lineage="l"), False, 0.01))
        await asyncio.sleep(0.2)
        assert not watching.done() and not learned, "it waits"
        hold_lineage_file(store, "l", None)
        while not learned:
            assert not watching.done()
            await asyncio.sleep(0.01)
        assert not watching.done()
        ends.append(True)
        await watching
        ends.clear()
        once = await watch.fn(WatchedLineage(lineage="l"), True, 0.01)
        assert once.files == () and len(learned) == 1, "held again, so this call ends"

    asyncio.run(hold_and_resume())


@pytest.fixture
def consolidating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[InboxWorker, ObjectStore]:
    """A watch that consolidates a lineage when its budget is spent, and the store, in which version 1 is champion."""
    monkeypatch.setattr(InboxWorker, "_hold_cancelled", none_cancelled)
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    store = open_store(str(tmp_path / "store"))
    store_version(store, {})
    move(store, "1")
    settings = {"lineage": "l", "gate": {"max_total_drop_points": 8}, "consolidate": {"when_spent": True}}
    spec = parse(WatchedLineage, settings, "test")
    return InboxWorker(store, spec, settle_seconds=0, once=False, wait=True), store


def test_a_consolidation_that_failed_is_tried_again_only_for_another_champion(
    consolidating: tuple[InboxWorker, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    async def fail(*args: Any) -> None:
        tried.append(str(Versions(store).champion("l")))
        raise ConfigError("It learns preferences.")

    monkeypatch.setattr("flows.watch.consolidate_locked", fail)
    worker, store = consolidating

    def reject(parent: str) -> None:
        check = {"kind": "total_drop", "task": "bank", "value": 9.0, "limit": 8.0}
        store_version(store, {}, parent_version=parent, accepted=False, failed_checks=(check,))
        asyncio.run(worker.handle_open())

    reject("1")
    reject("1")
    assert len(tried) == 1, "the reason names another version, and the champion is the same"
    store_version(store, {}, parent_version="1")
    move(store, "4")
    reject("4")
    assert len(tried) == 2


def test_an_idle_look_reads_the_versions_once(
    consolidating: tuple[InboxWorker, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_all = Versions.all
    monkeypatch.setattr(Versions, "all", lambda self, lineage: read.append(lineage) or read_all(self, lineage))
    asyncio.run(consolidating[0].handle_open())
    assert read == ["l"]
