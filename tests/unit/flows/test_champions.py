"""The nightly evaluation: a lineage that fails does not stop the others, and lower accuracies are reported."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import flows.champions
from deal_core.config import EvaluateConfig
from deal_core.errors import DealError, RegistryError, StoreError
from tasks.progress import Interrupted, LogReporter, reporting_to


@pytest.fixture(autouse=True)
def three_lineages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lineages a and c with a champion, b without one."""
    registry = SimpleNamespace(champion=lambda name: None if name == "b" else name)
    monkeypatch.setattr(flows.champions, "open_registry", lambda: registry)
    monkeypatch.setattr(flows.champions, "current_store", lambda: None)
    monkeypatch.setattr(flows.champions, "known_lineages", lambda store: ("a", "b", "c"))


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
    def open_rollout(name: str) -> None:
        if name == "a":
            raise StoreError("its log is damaged")

    checked: list[str] = []
    monkeypatch.setattr(flows.champions, "known_lineages", lambda store: ["a", "b", "c"])
    monkeypatch.setattr(flows.champions, "PromotionLog", lambda store: SimpleNamespace(open_rollout=open_rollout))
    monkeypatch.setattr(flows.champions, "open_registry", lambda: SimpleNamespace(lineages_with=lambda alias: {"c"}))
    monkeypatch.setattr(flows.champions, "check_rollout", checked.append)
    with pytest.raises(DealError, match=r"Of 3 lineages 1 could not be looked at\. a: .*its log is damaged"):
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
    monkeypatch.setattr(flows.champions, "find_version", lambda *_: None)
    monkeypatch.setattr(flows.champions, "version_ref", lambda _: SimpleNamespace(version="3"))
    monkeypatch.setattr(flows.champions, "evaluate_settings", lambda _: EvaluateConfig())
    monkeypatch.setattr(flows.champions, "score_version", lambda *_: scores)

    class Screen(LogReporter):
        def said(self, message: str) -> None:
            said.append(message)

    async def evaluate() -> Any:
        with reporting_to(Screen()):
            return await flows.champions.evaluate.fn("a")

    assert asyncio.run(evaluate()).accuracies["bank"] == 0.25
    (line,) = said
    assert "Version 3 of a" in line and "25.0% on bank, below the 75.0%" in line
