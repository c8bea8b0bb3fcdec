"""What becomes of versions by the promotion log: the tags and aliases that the registry had."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count
from typing import Any

from infra.tracking.facts import VersionFacts
from infra.version_log import StoredVersion
from tasks.lineage.rebuild import aliases_after, tags_after

from infra.promotions import Move

NOW = datetime(2030, 1, 1, tzinfo=UTC)
numbers = count(1)


def move(action: Any, version: str, before: str | None, champion: str | None, run: str | None = None) -> Move:
    return Move(
        number=next(numbers),
        when=NOW,
        action=action,
        lineage="l",
        version=version,
        before=before,
        champion=champion,
        who="somebody",
        why="because",
        run=run,
    )


def version(number: int, **changes: Any) -> StoredVersion:
    facts: dict[str, Any] = {
        "run_key": str(number),
        "task": "t",
        "strategy": "deal",
        "base_sha256": "",
        "dataset_sha256": "",
        "config_sha256": "",
        "adapter_uri": "",
        "adapter_sha256": "",
        "files_sha256": {},
        "landed_sha256": "e",
        "train_seconds": 1.0,
        "parent_version": None,
        "accepted": True,
        "reasons": (),
        "average_accuracy": None,
        "forgetting": None,
        "backward_transfer": None,
        "forward_transfer": None,
        **changes,
    }
    return StoredVersion(lineage="l", version=str(number), created=NOW, facts=VersionFacts(**facts))


def test_the_newest_move_says_who_is_champion_and_the_newest_change_who_was_before() -> None:
    versions = [version(1), version(2), version(3), version(4, approval="awaiting"), version(5, accepted=False)]
    moves = [
        move("promoted", "1", None, "1", "k"),
        move("promoted", "2", "1", "2", "k"),
        move("rolled back", "1", "2", "1"),
        move("promoted", "3", "1", "3", "k"),
        move("rejected", "4", "3", "3"),
    ]
    assert aliases_after(versions, moves) == {"champion": "3", "previous": "1", "challenger": "4"}
    assert aliases_after(versions, moves[:3]) == {"champion": "1", "previous": "2", "challenger": "4"}
    assert aliases_after(versions[:2], moves) == {"previous": "1", "challenger": "2"}, "version 3 is not there"
    assert aliases_after([], []) == {}


def test_a_version_whose_run_died_before_its_promotion_is_no_challenger_so_that_the_next_run_completes_it() -> None:
    moves = [move("promoted", "1", None, "1", "k")]
    assert aliases_after([version(1), version(2)], moves)["challenger"] == "1"


def test_moves_become_the_tags_that_they_set() -> None:
    moves = [
        move("promoted", "1", None, "1", "k"),
        move("promoted", "2", "1", "2"),
        move("rolled back", "1", "2", "1"),
        move("promoted", "2", "1", "2"),
        move("rejected", "3", "2", "2"),
    ]
    assert tags_after(moves) == {
        "1": {"promoted": str(moves[0].number)},
        "2": {"promoted": str(moves[3].number), "approval": "given"},
        "3": {"approval": "refused", "refused_by": "somebody", "refused_why": "because"},
    }
