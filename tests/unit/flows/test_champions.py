"""Flows over all lineages: one that fails does not stop the others. An evaluation reports lower accuracies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

import flows.champions
from deal_core.errors import DealError, RegistryError
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from tasks.monitoring.rollout import RolloutLook, RolloutStatus
from tasks.progress import Interrupted, LogReporter, reporting_to
from tests.stored_versions import move, store_version


@pytest.fixture(autouse=True)
def three_lineages(home: Path) -> None:
    """Lineages a and c with a champion, b without one."""
    for name in ("a", "b", "c"):
        stored = store_version(open_store(), {}, name)
        if name != "b":
            move(open_store(), stored.version, lineage=name)


def champions(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Score the champions, where a's raises the error; the others are scored nevertheless."""
    scored: list[str] = []

    async def score(name: str) -> None:
        if error and name == "a":
            raise error
        scored.append(name)

    monkeypatch.setattr(flows.champions, "evaluate", score)
    try:
        asyncio.run(flows.champions.evaluate_champions.fn())
    finally:
        assert scored == ([] if isinstance(error, Interrupted) else ["c"] if error else ["a", "c"])


def test_every_lineage_with_a_champion_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    champions(monkeypatch, None)


@pytest.mark.parametrize("error", [RegistryError("its adapter is gone"), RuntimeError("out of memory")])
def test_a_lineage_that_fails_holds_up_no_other(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(DealError, match=f"Of 3 lineages 1 could not be scored. a: .*{error}"):
        champions(monkeypatch, error)


def test_an_evaluation_that_was_asked_to_stop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        champions(monkeypatch, Interrupted())


def test_a_lineage_whose_log_is_damaged_keeps_no_other_rollout_open(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = store_version(open_store(), {}, "c", parent_version="1")
    move(open_store(), tried.version, "rollout", lineage="c", rollout="shadow")
    open_store().put_bytes("promotions/a/00000001.json", b"{")
    checked: list[str] = []

    def check(store: ObjectStore, name: str) -> RolloutLook:
        checked.append(name)
        return RolloutLook(status=RolloutStatus(lineage=name))

    monkeypatch.setattr(flows.champions, "check_rollout", check)
    with pytest.raises(DealError, match=r"Of 3 lineages 1 could not be looked at\. a: .*promotions/a/00000001"):
        asyncio.run(flows.champions.rollouts.fn())
    assert checked == ["c"]


def test_an_accuracy_below_the_recorded_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    scores = SimpleNamespace(
        accuracies={"bank": 0.25, "clinic": 0.5, "new": 0.0},
        recorded={"bank": 0.75, "clinic": 0.5},
        num_rows={"bank": 4, "clinic": 4, "new": 4},
        unjudged={},
    )
    monkeypatch.setattr(flows.champions, "score_version", lambda *_: scores)

    class Screen(LogReporter):
        def said(self, message: str) -> None:
            said.append(message)

    with reporting_to(Screen()):
        result = asyncio.run(flows.champions.score_again("a"))
    assert result.accuracies["bank"] == 0.25
    (line,) = said
    assert "Version 1 of a" in line and "25.0% on bank, below the 75.0%" in line
