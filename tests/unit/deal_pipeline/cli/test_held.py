"""What programs and people are told about arrivals that a cancelled run holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Answer

from deal_pipeline.cli.app import app
from infra.lineage_state import read_state, update
from infra.store.opening import open_store
from tasks.arrival_queue import Result, claim, finish
from tasks.arrivals import held_arrivals, sense_inbox
from tasks.housekeeping.arrivals import find_arrival
from tasks.inbox import look
from tasks.lineage.settings import read_lineage
from tests.in_process import put_back

KEY, WHY = "inbox/parcels/a.jsonl", "Its run was cancelled."
Deal = Callable[..., Answer]


@pytest.fixture
def deal(home: Path) -> Iterator[Deal]:
    """Runs a command in a home where an arrival of lineage l is held."""
    with put_back():
        path = home / "store" / KEY
        path.parent.mkdir(parents=True)
        path.write_text("nonsense\n")
        (home / "store" / "lineages").mkdir()
        (home / "store" / "lineages" / "l.yaml").write_text("tasks: [parcels]\n")
        store = open_store()
        spec, now = read_lineage(store, "l"), datetime.now(UTC)
        state = claim(sense_inbox(store, spec, look(store), 0), spec.retrain, now, lambda _: 0.0, "one")
        update(store, "l", lambda _: finish(state, "one", Result("held", WHY), now, {}))
        yield lambda *words: CliRunner().invoke(app, list(words))


def found(result: Answer) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_programs_find_a_held_arrival_beside_those_that_have_a_dataset(deal: Deal) -> None:
    (held,) = found(deal("data", "list", "--json"))
    assert (held["name"], held["task"], held["dataset_sha256"]) == (KEY, "parcels", None)
    assert (held["file"], held["landed"]) == (KEY.rpartition("/")[2], None)
    assert held["state"] == f"held for l: {WHY}"


def test_the_history_for_programs_has_versions_only(deal: Deal) -> None:
    assert found(deal("version", "list", "--lineage", "l", "--json")) == []
    shown = deal("version", "list", "--lineage", "l").stdout
    assert f"{KEY} is held: {WHY} Let it go on with: deal data release {KEY} --lineage l" in shown


@pytest.mark.parametrize("words", [[KEY], ["--all"]])
def test_a_held_arrival_is_released_by_its_name_or_with_all_others(deal: Deal, words: list[str]) -> None:
    assert found(deal("data", "release", *words, "--lineage", "l", "--json"))["released"] == [KEY]
    assert not held_arrivals(read_state(open_store(), "l"))


@pytest.mark.parametrize("words", [[], [KEY, "--all"]])
def test_it_must_be_clear_which_arrivals_are_released(deal: Deal, words: list[str]) -> None:
    result = deal("data", "release", *words, "--lineage", "l")
    assert result.exit_code == 2 and result.stdout == ""
    assert "Name the held arrivals" in result.stderr
    assert [arrival.key for arrival in held_arrivals(read_state(open_store(), "l"))] == [KEY], "it is still held"


def test_an_arrival_that_was_not_learned_is_found_by_the_name_of_its_file(deal: Deal, home: Path) -> None:
    name = KEY.rpartition("/")[2]
    assert find_arrival(open_store(), name).key == KEY
    other = home / "store" / "inbox" / "bank" / name
    other.parent.mkdir()
    other.write_text("other rows\n")
    for words, code in (([name], "ambiguous-arrival"), (["june.csv"], "unknown-arrival")):
        refused = deal("data", "delete", *words, "--dry-run", "--json")
        assert refused.exit_code == 2 and json.loads(refused.stderr)["code"] == code
