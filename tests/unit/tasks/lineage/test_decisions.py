"""Decisions of a person: the messages name commands that can be typed as they are, and arrivals are left behind."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from infra.tracking.facts import VersionInfo

from deal_core.errors import RegistryError
from deal_core.evaluation.metrics import AccuracyMatrix
from flows.adapt import adapted, repeated
from infra.promotions import Change, PromotionLog
from infra.store.local import open_store
from tasks.adaptation.promote import rejected_by_person
from tasks.lineage.decisions import find_left_behind, promote_to, reject_version, roll_back
from tasks.lineage.decisions import left_behind as left_behind_by
from tasks.references import DatasetRef, VersionRef


def known_version(number: int, parent: int | None = None, **values: Any) -> VersionInfo:
    """An accepted version of lineage 'support' that has learned an arrival of its own."""
    nothing = {field.name: None for field in fields(VersionInfo)}
    known = {
        "accepted": True,
        "lineage": "support",
        "task": "t",
        "version": str(number),
        "parent_version": parent and str(parent),
        "dataset_sha256": f"{number:064d}",
        "aliases": (),
    }
    return VersionInfo(**{**nothing, **known, **values})  # type: ignore[arg-type]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 is champion and continues 1; so does 3, which never was."""
    known = {str(number): known_version(number, parent) for number, parent in ((1, None), (2, 1), (3, 1))}
    registry = SimpleNamespace(versions=lambda lineage: list(known.values()))
    log = SimpleNamespace(moves=lambda lineage: [])
    monkeypatch.setattr("tasks.lineage.decisions._look", lambda lineage: (registry, log, "2", None, known["2"]))
    monkeypatch.setattr("tasks.lineage.decisions._require_usable", lambda *args: None)
    monkeypatch.setattr("tasks.lineage.decisions.find_version", lambda registry, lineage, number: known[number])
    for name in ("open_registry", "PromotionLog", "current_store"):
        monkeypatch.setattr(f"tasks.lineage.decisions.{name}", lambda *args: None)
    monkeypatch.setattr("tasks.lineage.decisions.settle_aliases", lambda *args: ("2", None))


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    ("decide", "version", "remedy"),
    [
        (promote_to, "1", "deal rollback --to 1 --lineage support."),
        (promote_to, "3", "deal requeue 3 --lineage support, which"),
        (roll_back, "3", "deal promote 3 --lineage support; see: deal history --lineage support"),
        (reject_version, "2", "deal rollback --lineage support"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_command_for_its_lineage(decide: Any, version: str, remedy: str) -> None:
    with pytest.raises(RegistryError) as refused:
        decide("support", version, who="tester", why="a test")
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (known_version(3, 1, accepted=False, reasons=("It forgot bank.",)), "rejected already, by its gate: It forgot"),
        (known_version(3, 1, approval="refused", reasons=()), "rejected already, by anna: labels look wrong"),
        (known_version(4, 1, approval="refused", reasons=()), "the promotion log does not say by whom"),
    ],
)
def test_a_version_that_was_rejected_before_tells_by_whom_and_why(
    versions: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: VersionInfo, told: str
) -> None:
    log = PromotionLog(open_store(str(tmp_path)))
    last = None
    for number, who, why in (("3", "anna", "labels look wrong"), ("2", "ben", "another reason")):
        change = Change(
            action="rejected", lineage="support", version=number, before="1", champion="1", who=who, why=why
        )
        last = log.add(last, change)
    monkeypatch.setattr("tasks.lineage.decisions.PromotionLog", lambda store: log)
    monkeypatch.setattr("tasks.lineage.decisions.find_version", lambda *args: version)
    with pytest.raises(RegistryError, match=told):
        reject_version("support", version.version, who="tester", why="a test")


def test_a_version_that_waits_names_the_commands_that_decide() -> None:
    version = VersionRef(
        lineage="support",
        version="3",
        run_key="k",
        adapter_uri="a",
        adapter_sha256="s",
        files_sha256={},
        accepted=True,
        approval="awaiting",
        standing="awaiting approval",
    )
    dataset = DatasetRef(task="bank", uri="d", sha256="s", num_train=1, num_test=1, num_rejected=0, landed_sha256="x")
    found: Any = SimpleNamespace(
        accuracies={},
        metrics={},
        num_steps=1,
        resumed_from_step=None,
        matrix=AccuracyMatrix().with_row("bank", {"bank": 0.5}, base_accuracy=0.25, parent_accuracy=None),
    )
    for result in (repeated(version, dataset), adapted(version, dataset, found, found, "t", {})):
        which = "3 --lineage support"
        assert f"awaits approval: deal promote {which}, or deal reject {which} --why REASON." in result.message


def test_a_version_that_a_person_rejected_can_be_requeued() -> None:
    assert rejected_by_person(known_version(3, 1)).endswith("deal requeue 3 --lineage support")


def left_behind(monkeypatch: pytest.MonkeyPatch, champion: int, *versions: VersionInfo) -> list[str]:
    registry = SimpleNamespace(versions=lambda lineage: versions, champion=lambda lineage: versions[champion - 1])
    monkeypatch.setattr("tasks.lineage.decisions.open_registry", lambda: registry)
    return [each.version for each in find_left_behind("l")]


def test_a_version_that_awaited_approval_while_the_champion_moved_is_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = known_version(1, parent_version=None), known_version(2, parent_version="1", approval="awaiting")
    assert left_behind(monkeypatch, 1, first, second) == []
    third = known_version(3, parent_version="1")
    assert left_behind(monkeypatch, 3, first, second, third) == ["2"]
    again = known_version(4, parent_version="3", approval="awaiting", dataset_sha256=second.dataset_sha256)
    assert left_behind(monkeypatch, 3, first, second, third, again) == [], "it can be promoted"
    tried = known_version(5, parent_version="3", dataset_sha256=second.dataset_sha256, aliases=("rollout",))
    assert left_behind(monkeypatch, 3, first, second, third, tried) == [], "it may become champion"


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
