"""The outcome of an arrival whose run fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deal_core.errors import ConfigError, StoreError, TrainingDivergedError
from flows.watch import InboxWorker
from infra.store.local import open_store
from tasks.inbox import Handled, list_arrivals, read_state
from tasks.spec import LineageSpec


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
        worker = InboxWorker(store, LineageSpec(lineage="l"), (), settle_seconds=0, once=True, wait=True)
        asyncio.run(worker._handle(info, ""))
        handled = read_state(store, "l").files[info.key]
        assert worker.runs == [] and handled.outcome == "failed"
        return handled

    return handle


def test_a_training_that_diverged_is_not_tried_again_and_says_what_to_do(failing: Any) -> None:
    handled = failing(TrainingDivergedError("The training diverged. Lower train.learning_rate."))
    assert handled.due() is None
    assert handled.message.startswith("The training diverged. Lower train.learning_rate. It is not tried again")
    assert "deal watch --once --lineage l --spec SPEC" in handled.message


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
