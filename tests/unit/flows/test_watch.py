"""The outcome of an arrival whose run fails."""

from __future__ import annotations

import asyncio
import os
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deal_core.errors import ConfigError, StoreError, TrainingDivergedError
from flows.watch import WatchResult, watch
from infra.lineage_state import read_state
from infra.store.base import ObjectStore
from infra.store.opening import store_at
from infra.versions import Versions
from tasks.arrivals import sense_inbox
from tasks.inbox import InboxLook, look
from tasks.lineage.settings import WatchedLineage, add_lineage, pause_lineage
from tasks.spec import parse
from tests.in_process import KilledError
from tests.stored_versions import move, store_version


class Failed(NamedTuple):
    """What is noted of an arrival that failed."""

    message: str
    due: datetime | None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is announced of arrivals that no adaptation began for."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr("flows.watch.announce_failure", lambda *given: found.append(given))
    return found


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Handle one arrival of lineage 'l', whose run ends with an error."""

    def handle(error: Exception) -> Failed:
        async def fail(*args: Any) -> None:
            raise error

        monkeypatch.setattr("flows.watch.adapt_locked", fail)
        store = store_at(str(tmp_path))
        store.put_bytes("inbox/bank/a.csv", b"text,label\na,b\n")
        monkeypatch.setattr("flows.watch.open_store", lambda: store)
        monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
        result = asyncio.run(watch.fn(WatchedLineage(lineage="l"), True, 0))
        assert result.runs == () and [seen.outcome for seen in result.files] == ["failed"]
        state = read_state(store, "l")
        (note,), (batch,) = state.arrivals.values(), state.batches
        return Failed(note.why, batch.due)

    return handle


def test_a_training_that_diverged_is_not_tried_again_and_says_what_to_do(failing: Any) -> None:
    handled = failing(TrainingDivergedError("The training diverged. Lower train.learning_rate."))
    assert handled.due is None
    assert handled.message.startswith("The training diverged. Lower train.learning_rate. It is not tried again")
    assert "deal adapt SPEC --watch --once --lineage l" in handled.message


def test_any_other_failure_is_tried_again(failing: Any, told: list[tuple[Any, ...]]) -> None:
    assert failing(ConfigError("train.num_processes is 9.")).due is not None
    assert told == [], "the adaptation itself has announced it"


def test_a_task_file_that_cannot_be_read_is_announced(
    failing: Any, told: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = StoreError("The store does not answer.")

    def away(*args: Any) -> None:
        raise error

    monkeypatch.setattr("flows.watch.task_spec", away)
    handled = failing(AssertionError("no adaptation begins"))
    assert handled.message == str(error) and handled.due is not None
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
    store = store_at(str(tmp_path / "store"))
    monkeypatch.setattr("flows.watch.open_store", lambda: store)
    store.put_bytes("inbox/bank/a.csv", b"text,label\na,b\n")
    os.utime(tmp_path / "store/inbox/bank/a.csv", (0, 0))
    looks = 0

    def look_at(*given: Any) -> InboxLook:
        nonlocal looks
        looks += 1
        if looks % 4:
            store.put_bytes("inbox/bank/growing.csv", b"text,label\n" * looks)
        else:
            store.delete("inbox/bank/growing.csv")
        return look(*given)

    monkeypatch.setattr("flows.watch.look", look_at)
    monkeypatch.setattr("flows.watch.sense_inbox", lambda *given: sense_inbox(*given[:3], 60))
    for number in (1, 2):
        asyncio.run(watch.fn(WatchedLineage(lineage="l"), True, 0.01))
        assert (len(tried), looks) == (number, 4 * number), "the next call tries it again at once"


def test_a_watch_waits_while_its_lineage_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[object] = []
    ends: list[bool] = []

    async def learn(*args: Any) -> None:
        learned.append(pause_lineage(store, "l", "enough"))
        raise ConfigError("It was tried, which is all that counts here.")

    monkeypatch.setattr("flows.watch.adapt_locked", learn)
    monkeypatch.setattr("flows.watch.is_stopped", lambda: bool(ends))
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    store = store_at(str(tmp_path / "store"))
    monkeypatch.setattr("flows.watch.open_store", lambda: store)
    add_lineage(store, parse(WatchedLineage, {"lineage": "l"}, "test"))
    pause_lineage(store, "l", "the labels are being corrected")
    store.put_bytes("inbox/bank/a.csv", b"text,label\na,b\n")

    async def hold_and_resume() -> None:
        watching = asyncio.create_task(watch.fn(WatchedLineage(lineage="l"), False, 0.01))
        await asyncio.sleep(0.2)
        assert not watching.done() and not learned, "it waits"
        pause_lineage(store, "l", None)
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
def consolidating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The store of a lineage that is consolidated when its budget is spent, in which version 1 is champion."""
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    store = store_at(str(tmp_path / "store"))
    monkeypatch.setattr("flows.watch.open_store", lambda: store)
    store_version(store, {})
    move(store, "1")
    return store


def one_look() -> WatchResult:
    settings = {"lineage": "l", "gate": {"max_total_drop_points": 8}, "consolidate": {"when_spent": True}}
    return asyncio.run(watch.fn(parse(WatchedLineage, settings, "test"), True, 0.01))


def test_a_consolidation_that_failed_is_tried_once_by_a_watch(
    consolidating: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    async def fail(*args: Any) -> None:
        tried.append(str(Versions(consolidating).champion("l")))
        raise ConfigError("It learns preferences.")

    monkeypatch.setattr("flows.watch.consolidate_locked", fail)
    check = {"kind": "total_drop", "task": "bank", "value": 9.0, "limit": 8.0}
    store_version(consolidating, {}, parent_version="1", accepted=False, failed_checks=(check,))
    one_look()
    assert len(tried) == 1 and read_state(consolidating, "l").batches == ()
    one_look()
    assert len(tried) == 2, "another watch tries it again"


def test_a_consolidation_that_a_dead_process_has_left_is_gone_on_with(
    consolidating: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    async def die(*args: Any) -> None:
        tried.append("died")
        raise KilledError

    async def end(*args: Any) -> None:
        tried.append("ended")
        move(consolidating, "3")  # one that rejects nothing is champion now

    check = {"kind": "total_drop", "task": "bank", "value": 9.0, "limit": 8.0}
    store_version(consolidating, {}, parent_version="1", accepted=False, failed_checks=(check,))
    store_version(consolidating, {}, parent_version="1")
    monkeypatch.setattr("flows.watch.consolidate_locked", die)
    with pytest.raises(KilledError):
        one_look()
    assert [batch.files for batch in read_state(consolidating, "l").batches] == [()]
    monkeypatch.setattr("flows.watch.consolidate_locked", end)
    one_look()
    assert tried == ["died", "ended"] and read_state(consolidating, "l").batches == ()


def test_an_idle_look_reads_the_versions_once(consolidating: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_all = Versions.all
    monkeypatch.setattr(Versions, "all", lambda self, lineage: read.append(lineage) or read_all(self, lineage))
    one_look()
    assert read == ["l"]
