"""What programs and people are told about arrivals that a cancelled run holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli.app import app
from tasks.context import current_store
from tasks.inbox import find_held, look, read_state, write_state
from tasks.lineage.promotion import LeftBehind
from tests.in_process import put_back

KEY, WHY = "inbox/parcels/a.jsonl", "Its run was cancelled."
HELD = {"key": KEY, "why": WHY}
Deal = Callable[..., Result]


@pytest.fixture
def deal(home: Path) -> Iterator[Deal]:
    """Runs a command about a lineage, one of whose arrivals is held."""
    with put_back():
        path = home / "store" / KEY
        path.parent.mkdir(parents=True)
        path.write_text("nonsense\n")
        state = read_state(current_store(), "l")
        (info,) = look(current_store()).arrivals
        state.record(info, "held", WHY, now=datetime.now(UTC))
        write_state(current_store(), "l", state)
        yield lambda *words: CliRunner().invoke(app, [*words, "--lineage", "l"])


def found(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_programs_find_a_held_arrival_after_the_versions_that_were_left_behind(
    deal: Deal, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"version": None, "task": "parcels", "dataset_sha256": None, **HELD}
    assert found(deal("requeue", "--json")) == [held], "the lineage has no version"
    left = LeftBehind(version="2", task="bank", dataset_sha256="3fa9")
    monkeypatch.setattr("tasks.lineage.promotion.find_left_behind", lambda lineage: (left,))
    assert found(deal("requeue", "--json")) == [left.model_dump(), held]
    assert f"{KEY} is held: {WHY}" in deal("requeue").stdout


def test_the_history_for_programs_has_versions_only(deal: Deal) -> None:
    assert found(deal("history", "--json")) == []
    assert f"{KEY} is held: {WHY} Let it go on with: deal requeue {KEY} --lineage l" in deal("history").stdout
    assert found(deal("requeue", KEY, "--json"))["released"] == [KEY]
    assert not find_held(current_store(), "l")


@pytest.mark.parametrize("words", [[KEY], [KEY, "2"]])
def test_named_arrivals_with_the_option_for_all_are_wrong_use(deal: Deal, words: list[str]) -> None:
    result = deal("requeue", *words, "--learn")
    assert result.exit_code == 2 and result.stdout == ""
    assert "Give either arrivals or --learn, not both" in result.stderr
    assert [each["key"] for each in found(deal("requeue", "--json"))] == [KEY], "it is still held"
