"""What is kept as JSON: the bytes stay those of `tests/golden/json`, and they are read back."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deal_core.config import AdapterConfig
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.errors import AdapterStateError, DataValidationError, StoreError
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.answering import ServedTask, ServedVersion
from deal_core.evaluation.metrics import LabelFigures
from deal_core.evaluation.report import AdapterFacts, EvaluationReport, GeneralScores
from deal_core.judging_config import RolloutTerms
from infra.run_journal import Run
from infra.store.local import FileStore
from infra.store.stored import Stored, read_stored, write_stored
from infra.versions import Version
from tasks.lineage.model_card import served_version
from tasks.lineage.record import FrozenRows, KnownTask, LineageRecord
from tasks.references import BaseRef

GOLDEN = Path(__file__).parents[1] / "golden" / "json"
TASKS = (
    TaskSchema(name="bank", labels=("Überweisung", "card lost"), instruction="Which?", template="{text}\n→"),
    TaskSchema(name="talk", format="chat", columns={"messages": "Verlauf"}),
)
MATRIX = AccuracyMatrix(
    tasks=("bank", "talk"), trained=("bank", "talk"), rows=((0.9, None), (1.0, 1 / 3)), base=(0.25, None)
)
REPORT = EvaluationReport(
    task="talk",
    accuracies={"bank": 1.0, "talk": 1 / 3},
    parent_accuracies={"bank": 0.9},
    base_accuracy=0.0,
    parent_accuracy_new_task=None,
    num_rows={"bank": 20, "talk": 3},
    matrix=MATRIX,
    notes=("Größe.",),
    outcomes={"bank": (1.0,) * 20, "talk": (0.25, 1.0, 0.0)},
    parent_outcomes={"bank": (1.0,) * 18 + (0.0, 0.0)},
    perplexity=31.5,
    metrics={"bank": "exact", "talk": "rouge_l"},
    base_perplexity=float("inf"),
    base_divergence=0.25,
    general={"json": GeneralScores(now=(1.0, 0.0), base=(1.0, 1.0), parent=None)},
    adapter=AdapterFacts(norm=1.25, parent_norm=None, is_changed=True),
    majority_rate=0.5,
    labels={
        "bank": (
            LabelFigures(label="Überweisung", num_rows=20, recall=1.0, share=0.95),
            LabelFigures(label=None, num_rows=0, recall=None, share=0.05),
        )
    },
)
MANIFEST = DatasetManifest(
    task=TASKS[0],
    sha256="ab" * 32,
    source="März.csv",
    num_read=10,
    num_train=5,
    num_test=3,
    num_rejected=2,
    problems={"empty text": 2},
    split="given",
    retain_training_rows=True,
    files=("cd" * 32,),
    landed_sha256="ef" * 32,
)
RECORD = LineageRecord(
    lineage="support",
    base=BaseRef(source="hub:x/y", name="y", sha256="01" * 32, quantize="4bit"),
    strategy="deal",
    adapter=AdapterConfig(rank=8, alpha=4, target_modules=("q_proj", "v_proj")),
    tasks=tuple(
        KnownTask(
            schema=task,
            tests=(FrozenRows(dataset_uri=f"datasets/{task.name}/x", num_rows=3),),
            max_prompt_tokens=256,
            max_new_tokens=7,
        )
        for task in TASKS
    ),
    matrix=MATRIX,
)
SERVED = ServedVersion(
    lineage="support",
    base_source="/models/y",
    base_name="y",
    base_sha256="01" * 32,
    tasks=tuple(ServedTask(schema=task, max_prompt_tokens=256, max_new_tokens=7) for task in TASKS),
    newest_task="talk",
    quantize="4bit",
)
STORED: dict[str, tuple[Any, type[Exception]]] = {
    "evaluation": (REPORT, ValueError),
    "matrix": (MATRIX, ValueError),
    "manifest": (MANIFEST, DataValidationError),
    "record": (RECORD, StoreError),
    "deal": (SERVED, AdapterStateError),
}


CREATED = datetime(2026, 3, 1, 12, tzinfo=UTC)
WRITTEN: dict[str, Stored] = {
    "version": Version(
        lineage="support",
        version="2",
        created=CREATED,
        task="talk",
        parent_version="1",
        moves_before=1,
        run_key="01" * 32,
        strategy="deal",
        base_sha256="02" * 32,
        dataset_sha256="03" * 32,
        landed_sha256="04" * 32,
        config_sha256="05" * 32,
        adapter_uri="adapters/support/0101",
        adapter_sha256="06" * 32,
        files_sha256={"method.json": ("07" * 32, "08" * 32)},
        accepted=False,
        reasons=("talk: Größe.",),
        failed_checks=({"kind": "floor", "task": "talk", "value": 20.0, "limit": None},),
        rollout=RolloutTerms("canary", 0.1, 200, 10.0, 0.95),
        train_seconds=1.5,
        average_accuracy=2 / 3,
        forgetting=None,
        backward_transfer=-0.25,
        forward_transfer=None,
        accuracies={"bank": 1.0, "talk": 1 / 3},
        general={"json": 0.5},
    ),
    "run": Run(
        lineage="support",
        task="talk",
        run_key="01" * 32,
        dataset_uri="datasets/talk/x",
        dataset_sha256="03" * 32,
        num_rows={"train": 5, "test": 3, "rejected": 2},
        base_sha256="02" * 32,
        parent_version="1",
        params={"train": {"max_steps": 3}, "strategy": "deal"},
        state="failed",
        started=CREATED,
        ended=CREATED,
        curve={"train/loss": ((1, 2.5), (2, float("inf")))},
    ),
}
"""What the store has of versions and runs."""


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def without_columns(served: ServedVersion) -> ServedVersion:
    return ServedVersion.from_json(served.to_json())


@pytest.mark.parametrize("name", STORED)
def test_the_bytes_stay(name: str) -> None:
    written = json.dumps(STORED[name][0].to_json(), ensure_ascii=False, indent=2).encode()
    assert written == (GOLDEN / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", STORED)
def test_what_was_written_is_read(name: str) -> None:
    value = STORED[name][0]
    read = type(value).from_json(golden(name))
    assert read == (without_columns(value) if name == "deal" else value)
    assert type(value).from_json(read.to_json()) == read, "also without a way through a file"
    assert repr(read) == repr(without_columns(value) if name == "deal" else value), "tuples are tuples again"


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("found", [99, "1", None])
def test_what_another_release_wrote_is_refused(name: str, found: object) -> None:
    value, error = STORED[name]
    with pytest.raises(error, match=rf"has schema version {found}, this release reads [14]; ") as raised:
        type(value).from_json({**golden(name), "schema_version": found})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["evaluation", "record"])
def test_a_matrix_inside_has_a_schema_version_of_its_own(name: str) -> None:
    values = golden(name)
    values["matrix"]["schema_version"] = 99
    with pytest.raises(ValueError, match=r"^The accuracy matrix has schema version 99, this release reads 1; "):
        type(STORED[name][0]).from_json(values)


@pytest.mark.parametrize("name", ["evaluation", "manifest", "deal"])
def test_an_unknown_field_is_refused(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match="surprise"):
        type(STORED[name][0]).from_json({**golden(name), "surprise": 1})


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("manifest", ("task",)),
        ("deal", ("tasks", 0)),
        ("record", ("adapter",)),
        ("deal", ("tasks", 0, "schema")),
        ("evaluation", ("adapter",)),
    ],
)
def test_an_unknown_field_inside_is_refused(name: str, path: tuple[Any, ...]) -> None:
    values = golden(name)
    inner = values
    for step in path:
        inner = inner[step]
    inner["surprise"] = 1
    with pytest.raises((TypeError, ValueError), match="surprise"):
        type(STORED[name][0]).from_json(values)


def test_a_version_is_served_as_its_record_says() -> None:
    assert (served_version(RECORD).quantize, served_version(RECORD).base_sha256) == ("4bit", RECORD.base.sha256)


def test_a_record_of_before_kept_rows_is_read_without_what_it_says_of_memory() -> None:
    """It also says which test rows did not judge. All judge now."""
    record = LineageRecord.from_json({**golden("record"), "memory": "tests", "spared": "all"})
    assert record == RECORD and record.to_json() == golden("record")


@pytest.mark.parametrize("name", STORED)
def test_a_missing_field_is_refused(name: str) -> None:
    for field in ("lineage", "tasks", "task"):
        values = {each: value for each, value in golden(name).items() if each != field}
        if values != golden(name):
            with pytest.raises((TypeError, ValueError, KeyError), match=field):
                type(STORED[name][0]).from_json(values)


def test_what_a_field_refuses_is_said_in_its_own_words() -> None:
    values = golden("matrix")
    with pytest.raises(ValueError, match=r"^The matrix has \(2.0, None\) for 2 tasks; give shares from 0 to 1\.$"):
        AccuracyMatrix.from_json({**values, "base": [2.0, None]})
    with pytest.raises(ValueError, match=r"^The matrix has 1 rows for 2 versions"):
        EvaluationReport.from_json({**golden("evaluation"), "matrix": {**values, "rows": values["rows"][:1]}})


@pytest.mark.parametrize("name", WRITTEN)
def test_versions_and_runs_in_the_store_keep_their_bytes_and_are_read_back(name: str, tmp_path: Path) -> None:
    stored, store = WRITTEN[name], FileStore(tmp_path)
    write_stored(store, name, stored)
    assert store.get_bytes(name) == (GOLDEN / f"{name}.json").read_bytes()
    assert read_stored(store, name, type(stored), what="it", remedy="") == stored
    store.put_bytes(name, json.dumps({**golden(name), "schema_version": 99}).encode())
    with pytest.raises(StoreError, match="has schema version 99, this release reads 1; "):
        read_stored(store, name, type(stored), what="it", remedy="")
    for values in ({**golden(name), "surprise": 1}, {key: each for key, each in golden(name).items() if key != "task"}):
        store.put_bytes(name, json.dumps(values).encode())
        with pytest.raises(StoreError, match=r"is damaged \(.*(surprise|task)"):
            read_stored(store, name, type(stored), what="it", remedy="")
