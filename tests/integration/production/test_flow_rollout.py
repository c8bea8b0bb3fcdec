"""A rollout in the promotion log: how it begins, what ends it, and who decides."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from deal_core.errors import RegistryError
from deal_core.judging_config import RolloutTerms
from flows.champions import abort_rollout, check_rollout, finish_rollout
from flows.promote import decide
from infra.promotions import PromotionLog
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.adaptation.promote import promote_accepted
from tasks.lineage.history import find_version
from tasks.lineage.promotion import find_left_behind, promote_to, reject_version
from tests.adapting import next_parent
from tests.in_process import deal, deal_json
from tests.registering import register

BY = {"who": "Ada", "why": "a test"}
TERMS = RolloutTerms("canary", 0.1, 200, 10.0, 0.95)

pytestmark = pytest.mark.usefixtures("lineage")


@pytest.fixture
def lineage(copied_home: Path) -> None:
    """Versions 1 and 3 were promoted, in a copy of the home."""


def begin(name: str) -> Version:
    """Let the run of a new version end."""
    version = register(name, rollout=TERMS)
    promote_accepted(open_store(), version)
    return version


def in_rollout() -> str | None:
    """The version that the log names, and the one with the alias; they are the same."""
    store = open_store()
    opened = PromotionLog(store).open_rollout("l")
    found = next((version for version in Versions(store).all("l") if "rollout" in version.aliases), None)
    assert (opened.version if opened else None) == (found.version if found else None)
    return found.version if found else None


def champion() -> str:
    return find_version(open_store(), "l", None).version


def standing(version: str) -> str:
    return find_version(open_store(), "l", version).standing


def newest_move() -> tuple[str, str, str | None, str]:
    move = PromotionLog(open_store()).moves("l")[-1]
    return move.action, move.version, move.champion, move.who


def test_a_version_in_rollout_is_neither_champion_nor_parent_nor_left_behind() -> None:
    version = begin("a")
    assert (in_rollout(), champion(), standing("4")) == ("4", "3", "rollout")
    assert newest_move() == ("rollout", "4", "3", "gate")
    num_moves = len(PromotionLog(open_store()).moves("l"))
    store = open_store()
    promote_accepted(store, find_version(store, "l", "4"))  # its run died, and is completed again
    promote_accepted(store, version)
    assert len(PromotionLog(open_store()).moves("l")) == num_moves
    parent = next_parent()
    assert parent is not None and parent.version == "3" and find_left_behind(store, "l") == ()
    entries = [json.loads(open_store().get_bytes(info.key)) for info in open_store().list("promotions/l")]
    assert [entry.get("rollout") for entry in entries] == [None] * (num_moves - 1) + ["canary"]
    assert find_version(open_store(), "l", "4").rollout == TERMS


def test_a_newer_version_takes_the_place_of_the_one_in_rollout() -> None:
    begin("a")
    begin("b")
    assert (in_rollout(), standing("4")) == ("5", "left behind")
    assert [each.version for each in find_left_behind(open_store(), "l")] == ["4"]
    finish_rollout(open_store(), "l", **BY)
    assert (in_rollout(), champion(), newest_move()) == (None, "5", ("promoted", "5", "5", "Ada"))


def test_a_person_or_the_rollout_rejects_the_version() -> None:
    begin("a")
    reject_version(open_store(), "l", "4", **BY)
    assert (in_rollout(), standing("4")) == (None, "rejected by a person")
    begin("b")
    assert abort_rollout(open_store(), "l", who="rollout", why="worse").action == "rejected"
    assert (in_rollout(), champion(), standing("5")) == (None, "3", "rejected by its rollout")
    with pytest.raises(RegistryError, match="was rejected by its rollout"):
        promote_to(open_store(), "l", "5", **BY)
    for act in (abort_rollout, finish_rollout):
        with pytest.raises(RegistryError, match="No version of 'l' is tried"):
            act(open_store(), "l", **BY)


@pytest.mark.parametrize("by_form", [False, True])
def test_with_an_approval_the_person_begins_the_rollout(by_form: bool) -> None:
    promote_accepted(open_store(), register("a", rollout=TERMS, needs_approval=True))
    assert (in_rollout(), standing("4")) == (None, "awaiting approval")
    done = asyncio.run(decide("l", "4", "approve", **BY)) if by_form else promote_to(open_store(), "l", "4", **BY)
    assert (done.action, in_rollout(), champion()) == ("rollout", "4", "3")
    assert find_version(open_store(), "l", "4").approval == "given"
    assert check_rollout(open_store(), "l").decision is None, "nobody has asked it yet"
    assert promote_to(open_store(), "l", "4", **BY).action == "promoted" and (in_rollout(), champion()) == (None, "4")


def test_the_commands_say_what_is_tried() -> None:
    assert deal_json("rollout", "status")["status"]["version"] is None
    begin("a")
    found = deal_json("rollout", "status", "--apply")
    assert found["decision"] is None and found["status"]["report"]["verdict"] == "goes on"
    assert "0 of 200 answers count. It goes on." in deal("rollout", "status")
    assert "rollout" in deal("version", "list")
    assert "l rollout: version 4 is tried (canary) since" in deal("status")
    assert "Champion of l: version 4" in deal("rollout", "finish", "--reason", "enough")
