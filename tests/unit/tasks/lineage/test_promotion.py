"""Decisions of a person: the messages name commands that can be typed as they are, and arrivals are left behind."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.errors import RegistryError
from infra.branches import Branch, BranchEnd, Branches
from infra.promotions import Move, PromotionLog
from infra.store.format import write_format
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.adaptation.promote import is_overtaken, promote_accepted
from tasks.lineage.promotion import (
    find_left_behind,
    promote_to,
    reject_version,
    roll_back,
)
from tasks.lineage.promotion import left_behind as left_behind_by
from tasks.lineage.tombstones import Tombstone, put_tombstone
from tests.stored_versions import move, put_version, version


def put(number: int, parent: int | None = None, **changes: Any) -> Version:
    """Store an accepted version that has learned an arrival of its own, and return it as the lineage has it now."""
    stored = version(number, parent, **{"accepted": True, "dataset_sha256": f"{number:064d}", **changes})
    open_store().put_bytes(f"{stored.adapter_uri}/{WEIGHTS_FILE}", b"weights")
    put_version(open_store(), stored)
    found = Versions(open_store()).find("l", stored.version)
    assert found is not None
    return found


@pytest.fixture
def versions(home: Path) -> None:
    """Version 2 is champion and continues 1; so does 3, which never was."""
    for number, parent in ((1, None), (2, 1), (3, 1)):
        put(number, parent)
    for number in ("1", "2"):
        move(open_store(), number)


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    ("decide", "version", "remedy"),
    [
        (promote_to, "1", "deal version rollback 1 --lineage l."),
        (promote_to, "3", "deal version requeue 3 --lineage l, which"),
        (promote_to, "2", "champion already"),
        (roll_back, "3", "deal version promote 3 --lineage l; see: deal version list --lineage l"),
        (reject_version, "2", "deal version rollback --lineage l"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_command_for_its_lineage(decide: Any, version: str, remedy: str) -> None:
    with pytest.raises(RegistryError) as refused:
        decide(open_store(), "l", version, who="tester", why="a test")
    assert remedy in str(refused.value)


@pytest.mark.usefixtures("versions")
def test_a_version_of_an_open_branch_is_not_rejected() -> None:
    store = open_store()
    write_format(store)
    branches = Branches(store)
    branch = Branch(lineage="l", number=1, who="Ada", root="1", champion="2", arrivals={}, base_model="b")
    branches.begin(branch)
    put(4, 1, branch=1, remakes="2")
    with pytest.raises(RegistryError) as refused:
        reject_version(store, "l", "4", who="tester", why="a test")
    assert refused.value.code == "branch-open" and "deal lineage branch l --give-up" in str(refused.value)
    branches.end(branch, BranchEnd(outcome="given up", who="Ada"))
    assert reject_version(store, "l", "4", who="tester", why="a test").action == "rejected"


def champion() -> str | None:
    found = Versions(open_store()).champion("l")
    return found and found.version


def test_a_run_promotes_its_version_once_and_none_that_a_person_refused_or_another_has_overtaken(home: Path) -> None:
    store = open_store()

    def promote(number: str) -> None:
        version = Versions(store).find("l", number)
        assert version is not None
        promote_accepted(store, version)

    for number in (1, 2):
        put(number, number - 1 or None)
        promote(str(number))
        assert champion() == str(number)
    roll_back(store, "l", None, who="tester", why="a test")
    promote("2")  # its run is started again
    assert champion() == "1" and left_behind() == ["2"]
    put(3, 1)
    reject_version(store, "l", "3", who="tester", why="a test")
    assert is_overtaken(store, put(4, 2)) and not is_overtaken(store, put(5, 1))
    for number in ("3", "4"):
        with pytest.raises(RegistryError):
            promote(number)
        assert champion() == "1"


@pytest.mark.usefixtures("versions")
def test_a_person_goes_back_to_a_version_that_served_also_after_a_rollback() -> None:
    for number in ("1", "2"):
        assert roll_back(open_store(), "l", number, who="tester", why="a test").champion == champion() == number


def left_behind() -> list[str]:
    return [each.version for each in find_left_behind(open_store(), "l")]


def test_a_version_that_awaited_approval_while_the_champion_moved_is_left_behind(home: Path) -> None:
    put(1)
    second = put(2, 1, needs_approval=True)
    move(open_store(), "1")
    assert left_behind() == []
    put(3, 1)
    move(open_store(), "3")
    assert left_behind() == ["2"]
    put(4, 3, needs_approval=True, dataset_sha256=second.dataset_sha256)
    assert left_behind() == [], "it can be promoted"


def test_an_arrival_stays_left_behind_when_its_adapter_is_gone_and_drops_out_when_its_rows_were_deleted(
    home: Path,
) -> None:
    store = open_store()
    for number in (1, 2, 3):
        put(number, number - 1 or None)
        move(store, str(number))
    remade = put(4, 1, branch=1, remakes="3", dataset_sha256=f"{3:064d}")
    assert remade.standing == "remade"
    move(store, "4", branch=1)
    for number in ("2", "3"):
        Versions(store).note_removed("l", number, "2030-01-01")
    assert left_behind() == ["2"], "nobody has deleted its rows"
    put_tombstone(store, Tombstone(task="bank", sha256=f"{2:064d}", reason="", at=datetime.now(UTC)))
    assert left_behind() == []
    move(store, "1", "rolled back")
    assert left_behind() == ["4"], "it has been swapped in, so it may come back"


def test_who_goes_back_to_a_version_whose_adapter_goes_meanwhile_is_refused_and_the_champion_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, add = open_store(), PromotionLog.add
    for number in (1, 2):
        put(number, number - 1 or None)
        move(store, str(number))

    def add_after_a_note(log: PromotionLog, *arguments: Any) -> Move | None:
        Versions(store).note_removed("l", "1", "2030-01-01")
        return add(log, *arguments)

    monkeypatch.setattr(PromotionLog, "add", add_after_a_note)
    with pytest.raises(RegistryError):
        roll_back(store, "l", "1", who="tester", why="a test")
    assert champion() == "2"


def test_an_arrival_whose_version_is_tried_on_live_traffic_is_not_left_behind(home: Path) -> None:
    put(1)
    second = put(2, 1)
    put(3, 1)
    move(open_store(), "3")
    assert left_behind() == ["2"]
    put(4, 3, dataset_sha256=second.dataset_sha256)
    move(open_store(), "4", "rollout", rollout="shadow")
    assert left_behind() == [], "it may become champion"


def test_the_same_rows_under_another_split_are_left_behind_no_more(home: Path) -> None:
    first, second, third = put(1), put(2, 1, landed_sha256="x"), put(3, 1, landed_sha256="x")
    move(open_store(), "1")
    assert left_behind() == ["3"], "each arrival once"
    move(open_store(), "3")
    assert left_behind() == []
    assert left_behind_by([second, first], [third, first]) == ()


def test_rows_that_landed_again_to_judge_the_task_are_left_behind(home: Path) -> None:
    """The version rolled back to has learned the rows, and cannot be judged by them."""
    first, second, third = put(1), put(2, 1, landed_sha256="x"), put(3, 2, landed_sha256="x")
    move(open_store(), "2")
    assert left_behind() == ["3"]
    assert [each.version for each in left_behind_by([third, second, first], [second, first])] == ["3"]


def test_what_a_requeue_learned_stands_for_the_version_that_it_was_asked_for(home: Path) -> None:
    """Its rows may be others: some were bad until their label was added."""
    put(1)
    second = put(2, 1, landed_sha256="x")
    put(3, 1, landed_sha256="y", requeued_sha256=second.dataset_sha256)
    move(open_store(), "3")
    assert left_behind() == []
