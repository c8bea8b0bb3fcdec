"""What a lineage's champion has not learned, by what became of its versions."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from flows.promote import find_left_behind
from flows.promote import left_behind as left_behind_by
from infra.tracking.registry import VersionInfo


def known_version(number: int, **values: Any) -> VersionInfo:
    """An accepted version that has learned an arrival of its own, but for what is said."""
    nothing = {field.name: None for field in fields(VersionInfo)}
    known = {"accepted": True, "task": "t", "version": str(number), "dataset_sha256": f"{number:064d}"}
    return VersionInfo(**{**nothing, **known, **values})  # type: ignore[arg-type]


def left_behind(monkeypatch: pytest.MonkeyPatch, champion: int, *versions: VersionInfo) -> list[str]:
    registry = SimpleNamespace(versions=lambda lineage: versions, champion=lambda lineage: versions[champion - 1])
    monkeypatch.setattr("flows.promote.open_registry", lambda: registry)
    return [each.version for each in find_left_behind("l")]


def test_a_version_that_awaited_approval_while_the_champion_moved_is_left_behind(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = known_version(1, parent_version=None), known_version(2, parent_version="1", approval="awaiting")
    assert left_behind(monkeypatch, 1, first, second) == []
    third = known_version(3, parent_version="1")
    assert left_behind(monkeypatch, 3, first, second, third) == ["2"]
    again = known_version(4, parent_version="3", approval="awaiting", dataset_sha256=second.dataset_sha256)
    assert left_behind(monkeypatch, 3, first, second, third, again) == [], "it can be promoted"


def test_the_same_rows_under_another_split_are_left_behind_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = known_version(1, parent_version=None), known_version(2, parent_version="1", landed_sha256="x")
    third = known_version(3, parent_version="1", landed_sha256="x")
    assert left_behind(monkeypatch, 1, first, second, third) == ["3"], "each arrival once"
    assert left_behind(monkeypatch, 3, first, second, third) == []
    assert left_behind_by([second, first], [third, first]) == ()
    old = known_version(4, parent_version="1")
    assert left_behind(monkeypatch, 3, first, second, third, old) == ["4"], "it does not say how its rows landed"


def test_rows_that_landed_again_to_judge_the_task_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version rolled back to has learned the rows, and cannot be judged by them."""
    first, second = known_version(1, parent_version=None), known_version(2, parent_version="1", landed_sha256="x")
    third = known_version(3, parent_version="2", landed_sha256="x")
    assert left_behind(monkeypatch, 2, first, second, third) == ["3"]
    assert [each.version for each in left_behind_by([third, second, first], [second, first])] == ["3"]


def test_what_a_requeue_learned_stands_for_the_version_that_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows may be others: some were bad until their label was added."""
    first, second = known_version(1, parent_version=None), known_version(2, parent_version="1", landed_sha256="x")
    third = known_version(3, parent_version="1", landed_sha256="y", requeued_sha256=second.dataset_sha256)
    assert left_behind(monkeypatch, 3, first, second, third) == []
