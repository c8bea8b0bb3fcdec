"""Branches in the store: one open branch at a time, and what is done is read from the versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.errors import StoreError
from infra.branches import Branch, BranchEnd, Branches, is_swapped, made_by, tip_of
from infra.promotions import PromotionLog
from infra.store.keys import branch_key
from infra.store.local import FileStore
from infra.versions import Version
from tests.stored_versions import VERSION, move, store_version

ARRIVALS = {"2": "a", "3": "b"}


@pytest.fixture
def branches(tmp_path: Path) -> Branches:
    return Branches(FileStore(tmp_path))


def a_branch(number: int = 1, root: str | None = "1") -> Branch:
    return Branch(lineage="l", number=number, who="Ada", root=root, champion="3", arrivals=ARRIVALS, base_model="b")


def test_of_two_writers_one_begins_a_branch_and_it_stays_open_until_its_end(branches: Branches) -> None:
    branch = a_branch()
    assert branches.open("l") is None and branches.next_number("l") == 1
    assert branches.begin(branch) and not branches.begin(a_branch(root=None))
    assert branches.open("l") == branch
    end = BranchEnd(outcome="swapped", who="Ada", tip="5")
    assert branches.end(branch, end) and not branches.end(branch, BranchEnd(outcome="given up", who="Eve"))
    assert branches.open("l") is None and branches.next_number("l") == 2
    later = a_branch(number=2)
    branches.begin(later)
    assert branches.open("l") == later
    assert [(known.branch.number, known.end) for known in branches.all("l")] == [(1, end), (2, None)]
    assert branches.open("m") is None


def test_a_damaged_branch_stops_the_lineage(branches: Branches) -> None:
    """Else new arrivals would continue the champion."""
    branches.begin(a_branch())
    branches.store.put_bytes(branch_key("l", 1), b"{")
    with pytest.raises(StoreError, match="a branch of 'l', is damaged"):
        branches.open("l")


def made(number: str, remakes: str | None, *, branch: int | None = 1, accepted: bool = True) -> Version:
    own = {"version": number, "branch": branch, "remakes": remakes, "accepted": accepted}
    return VERSION.model_copy(update=own)


def test_the_tip_is_the_newest_accepted_version_of_the_branch_or_its_root() -> None:
    old = [made(number, None, branch=None) for number in ("1", "2", "3")]
    other = made("4", "2", branch=7)
    first, second = made("5", "2"), made("6", "3")
    rejected = made("6", "3", accepted=False)
    branch = a_branch()

    def tip(*versions: Version) -> str | None:
        found = tip_of(branch, [*old, other, *versions])
        return found and found.version

    assert (tip(), tip(first), tip(first, second), tip(first, rejected)) == ("1", "5", "6", "5")
    assert tip_of(a_branch(root=None), old) is None
    assert made_by(branch, [*old, other, first]) == {"2": first}


def test_only_the_newest_move_of_the_champion_tells_that_a_branch_was_swapped_in(branches: Branches) -> None:
    branch, store = a_branch(), branches.store
    for _ in range(5):
        store_version(store, {})
    assert not is_swapped(branch, PromotionLog(store).moves("l"))
    move(store, "3")
    move(store, "1", "rolled back")  # a person makes the branch's root champion
    assert not is_swapped(branch, PromotionLog(store).moves("l"))
    move(store, "5", branch=7)
    assert not is_swapped(branch, PromotionLog(store).moves("l"))
    move(store, "4", branch=1)
    move(store, "2", "rejected")  # the champion stays
    assert is_swapped(branch, PromotionLog(store).moves("l"))
    move(store, "3", "rolled back")
    assert not is_swapped(branch, PromotionLog(store).moves("l"))
