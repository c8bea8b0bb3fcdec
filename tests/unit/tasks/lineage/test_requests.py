"""Labels that a task gains by command, and what is then said of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deal_core.config import AdapterConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from infra.branches import Head
from infra.lineage_state import update
from infra.store.local import FileStore
from tasks.adaptation.run import AdaptationRun
from tasks.lineage.requests import Renewal, find_renewal
from tasks.references import BaseRef, DatasetRef
from tasks.spec import AdaptSpec, TaskSpec
from tasks.task_schema import _new_label_remedy, choose_schema
from tests.stored_versions import known_task, lineage_record

BANK = TaskSchema(name="bank", labels=("lost card", "fee"), instruction="Which?")
BASE = BaseRef(source="s", name="n", sha256="b")
DATASET = DatasetRef(task="bank", uri="d", sha256="s", num_train=1, num_test=1, num_rejected=0, landed_sha256="x")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def schema(store: FileStore, known: TaskSchema = BANK, **given: Any) -> TaskSchema:
    """What an arrival of task `bank` is checked by, in lineage `l` that knows it."""
    record = lineage_record(known_task(known))
    return choose_schema(store, TaskSpec(name="bank", data="x.csv", **given), record)


def keep_labels(store: FileStore, lineage: str, task: str, labels: Sequence[str]) -> None:
    """Add labels by command."""
    update(store, lineage, lambda state: state.model_copy(update={"labels": {task: tuple(labels)}}))


@pytest.mark.parametrize("known", [("lost card", "fee"), ("lost card", "fee", "late")])
@pytest.mark.parametrize("said", [None, ("lost card", "fee"), ("lost card", "fee", "late")])
def test_a_task_has_its_added_labels_before_and_after_a_version_knows_them(
    store: FileStore, known: tuple[str, ...], said: tuple[str, ...] | None
) -> None:
    keep_labels(store, "l", "bank", ["late"])
    found = schema(store, BANK.with_labels(known), **({"labels": said} if said else {}))
    assert found == BANK.with_labels(["late"])


@pytest.mark.parametrize("said", [("lost card", "fee", "late"), ("lost card",), ("fee", "lost card")])
def test_without_the_command_nobody_changes_a_task_s_labels(store: FileStore, said: tuple[str, ...]) -> None:
    keep_labels(store, "other", "bank", ["late"])
    keep_labels(store, "l", "clinic", ["late"])
    assert schema(store) == BANK
    with pytest.raises(ConfigError, match="deal task add-label bank LABEL --lineage l, or start a new lineage"):
        schema(store, labels=said)


def test_labels_are_added_and_nothing_else(store: FileStore) -> None:
    keep_labels(store, "l", "bank", ["late"])
    for said in (("fee", "lost card"), ("lost card", "late"), ("lost card", "fee", "late", "more")):
        with pytest.raises(ConfigError, match="the lineage learned it as"):
            schema(store, labels=said)
    with pytest.raises(ConfigError, match=r"task\.instruction of 'bank' is 'What\?'.*leave it out, or start"):
        schema(store, instruction="What?")


def test_a_dataset_widens_its_own_task_alone() -> None:
    dataset = DATASET.model_copy(update={"new_labels": ("late",)})
    assert dataset.widen(BANK).labels == ("lost card", "fee", "late")
    assert dataset.widen(TaskSchema(name="clinic", labels=("a",))).labels == ("a",)


def test_a_run_under_other_labels_is_another_run() -> None:
    spec = AdaptSpec(lineage="l", task=TaskSpec(name="bank", data="x.csv"))

    def key(*new_labels: str, branch: int | None = None) -> str:
        return AdaptationRun(
            head=Head(lineage="l", branch=branch),
            spec=spec,
            dataset=DATASET.model_copy(update={"new_labels": new_labels}),
            base=BASE,
            adapter=AdapterConfig(),
            strategy="deal",
            parent=None,
            record=None,
            tasks=(),
            renewal=Renewal(None, (), None),
        ).run_key

    assert len({key(), key("late"), key("late", "more"), key(branch=1), key(branch=2)}) == 5
    parts = ["l", "b", "bank", "s", "base", spec.config_sha256(AdapterConfig(), "deal"), 0]
    before, branched = (
        hashlib.sha256(json.dumps(each).encode()).hexdigest() for each in (parts, [*parts, {"branch": 1}])
    )
    assert key() == before, "a run that was at work before there were such goes on"
    assert key(branch=1) == branched


def test_a_mapping_names_the_cells_of_a_known_task_in_any_order(store: FileStore) -> None:
    keep_labels(store, "l", "bank", ["late"])
    found = schema(store, labels={"1": "Fee", "0": "lost card"})
    assert found.labels == ("lost card", "fee", "late")
    assert found.label_names == {"1": "Fee", "0": "lost card"}
    with pytest.raises(ConfigError, match="deal task add-label bank LABEL"):
        schema(store, labels={"0": "lost card", "1": "stolen card"})


def test_a_new_task_learns_every_turn_and_a_known_one_what_it_learned(store: FileStore) -> None:
    new = TaskSpec(name="talk", data="x.jsonl", labels={"0": "a", "1": "b", "2": "b"})
    chosen = choose_schema(store, new, None)
    assert (chosen.assistant_turns, chosen.labels) == ("all", ("a", "b"))
    stored_before = TaskSchema(name="bank", format="chat")  # no release before said anything of turns
    assert schema(store, stored_before).assistant_turns == "last"
    assert schema(store, stored_before, assistant_turns="all").assistant_turns == "all"


@pytest.mark.parametrize("was_asked", [False, True])
def test_a_request_for_new_test_rows_that_comes_during_a_run_is_for_the_next_arrival(
    store: FileStore, was_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.lineage.requests.is_renewal_asked", lambda *_: True)
    record = lineage_record(known_task(BANK, "old"))
    dataset = DATASET.model_copy(update={"renews_tests": was_asked})
    store.put_bytes("old/test.parquet", b"")
    assert (find_renewal(store, record, dataset).known is not None) == was_asked


def test_a_file_with_a_new_label_is_told_how_the_label_is_added() -> None:
    record = lineage_record(known_task(BANK))
    assert "deal task add-label bank LABEL --lineage l" in _new_label_remedy("bank", record)
    assert "task.labels in the spec" in _new_label_remedy("clinic", record), "no version has learned it"
    assert "task.labels in the spec" in _new_label_remedy("bank", None)
