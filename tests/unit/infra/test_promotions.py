"""The promotion log: entries are only added, and one of several concurrent writers wins."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deal_core.errors import StoreError
from infra.promotions import Change, Move, PromotionLog
from infra.store.opening import store_at


@pytest.fixture
def log(tmp_path: Path) -> PromotionLog:
    return PromotionLog(store_at((tmp_path / "store").as_uri()))


def add(log: PromotionLog, after: Move | None, version: str, **changes: Any) -> Move | None:
    fields: dict[str, Any] = {
        "action": "promoted",
        "lineage": "l",
        "version": version,
        "before": after.champion if after else None,
        "champion": version,
        "who": "gate",
        "why": "passed its gate",
    }
    return log.add(after, Change(**{**fields, **changes}))


def test_moves_come_back_in_order_and_whole(log: PromotionLog) -> None:
    last = None
    for number in range(1, 13):
        last = add(log, last, str(number), run=f"run{number}")
    assert [move.number for move in log.moves("l")] == list(range(1, 13))
    assert log.last("l") == last and last is not None
    assert (last.before, last.champion, last.run) == ("11", "12", "run12")
    assert log.moves("other") == () and log.last("other") is None


def test_of_moves_at_once_one_wins_and_nothing_of_the_others_is_written(log: PromotionLog) -> None:
    first = add(log, None, "1")
    with ThreadPoolExecutor(12) as pool:
        made = list(pool.map(lambda i: add(log, first, str(i), who=f"writer {i}"), range(2, 14)))
    (won,) = [move for move in made if move is not None]
    assert log.moves("l") == (first, won)


def test_the_champion_of_any_moment_is_known(log: PromotionLog) -> None:
    one = add(log, None, "1")
    two = add(log, one, "2")
    assert one is not None and two is not None
    rejected = add(log, two, "3", action="rejected", champion="2")
    assert rejected is not None
    assert log.champion_at("l", one.when - timedelta(seconds=1)) is None
    assert log.champion_at("l", one.when) == "1"
    assert log.champion_at("l", two.when) == log.champion_at("l", datetime.now(UTC)) == "2"


def test_a_rollout_is_open_until_the_champion_moves_or_its_version_is_rejected(log: PromotionLog) -> None:
    def rollout(after: Move | None, version: str) -> Move | None:
        return add(log, after, version, action="rollout", champion="1", rollout="shadow")

    last = add(log, None, "1")
    assert log.open_rollout("l") is None
    last = begun = rollout(last, "2")
    last = add(log, last, "9", action="rejected", champion="1")
    assert log.open_rollout("l") == begun, "another version was rejected"
    last = rollout(last, "3")
    assert log.open_rollout("l") == last and last is not None and last.rollout == "shadow"
    last = add(log, last, "3", action="rejected", champion="1")
    assert log.open_rollout("l") is None, "the one before does not come back"
    last = add(log, rollout(last, "4"), "1", action="rolled back")
    assert log.open_rollout("l") is None
    add(log, rollout(last, "5"), "5")
    assert log.open_rollout("l") is None


@pytest.mark.parametrize("number", [1, 2])
def test_a_move_that_lacks_fields_or_is_of_another_release_is_named(log: PromotionLog, number: int) -> None:
    log.store.put_bytes("promotions/l/00000001.json", f'{{"schema_version": {number}}}'.encode())
    with pytest.raises(StoreError, match=r"00000001\.json, an entry of the promotion log"):
        log.last("l")
