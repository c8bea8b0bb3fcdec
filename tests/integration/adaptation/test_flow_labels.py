"""A command adds a label to a task: its rows become good rows, and evaluation asks every version as serving does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from deal_pipeline.cli.app import app
from flows.forget import forget
from infra.store.opening import open_store
from infra.versions import Versions
from tasks import scorer
from tasks.lineage.datasets import read_manifest
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.predict import predict
from tests.adapting import BANK, CLINIC, run
from tests.in_process import put_back

LABELS = yaml.safe_load((EXAMPLES / "bank" / "spec.yaml").read_text())["task"]["labels"]
NEW = "swallowed card"
ROWS = [
    *({"text": f"A new message number {number} about my card.", "label": "lost card"} for number in range(20)),
    *({"text": f"Machine {number} has kept my card.", "label": NEW} for number in range(3)),
]
SPLITS = ["test"] * 7 + ["train"] * 15 + ["test"]
Deal = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")


@pytest.fixture
def deal() -> Iterator[Deal]:
    """Runs a command on lineage `l` and returns its JSON output; the environment is restored."""

    def invoke(*words: str) -> Any:
        result = CliRunner().invoke(app, [*words, "--lineage", "l", "--json"])
        return json.loads(result.stdout if result.exit_code == 0 else result.stderr)

    with put_back():
        yield invoke


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """A file for the known task, with rows of an unknown label."""
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def keep_what_is_asked(patch: pytest.MonkeyPatch) -> list[tuple[str, bool, int]]:
    """Each test set that a model answers from now on: task, whether the new label is offered, number of rows."""
    asked: list[tuple[str, bool, int]] = []
    evaluate_task = scorer.evaluate_task

    def evaluate(model: Any, tokenizer: Any, task: Any, rows: Any, *args: Any, **options: Any) -> Any:
        asked.append((task.schema.name, NEW in task.schema.labels, len(rows)))
        return evaluate_task(model, tokenizer, task, rows, *args, **options)

    patch.setattr(scorer, "evaluate_task", evaluate)
    return asked


def labels_of(version: int) -> list[str]:
    known = read_record(open_store(), find_version(open_store(), "l", str(version))).task("bank")
    assert known is not None
    return list(known.schema.labels)


def test_rows_of_a_new_label_are_bad_until_the_label_is_added(deal: Deal, tiny_base: Path, more: Path) -> None:
    run(tiny_base, {**BANK, "labels": LABELS})
    without = run(tiny_base, {"name": "bank", "data": str(more)})
    assert (without.status, without.dataset.num_train, without.dataset.num_rejected) == ("promoted", 20, 3)

    added = deal("task", "add-label", "bank", NEW, "Lost  card")
    assert (added["added"], added["present"], added["labels"]) == ([NEW], ["Lost  card"], [*LABELS, NEW])
    assert deal("task", "add-label", "bank", NEW)["added"] == [], "a repeated command finds the label"
    assert labels_of(2) == LABELS, "a version does not change"
    assert "knows no task 'bnak'; it knows bank." in deal("task", "add-label", "bnak", NEW)["error"]
    assert deal("check", str(more), "--task", "bank")["data"]["num_rejected"] == 0

    store = open_store()
    settings = {"base_model": str(tiny_base), "gate": NO_LIMITS, "train": {"max_steps": 2, "max_prompt_tokens": 192}}
    store.put_bytes("lineages/l.yaml", yaml.safe_dump(settings).encode())
    store.put_bytes("inbox/bank/task.yaml", yaml.safe_dump({"labels": LABELS}).encode())
    store.put_bytes("inbox/bank/more.jsonl", more.read_bytes())
    (seen,) = deal("adapt", "--watch", "--once", "--poll", "0.1")["files"]
    assert seen["outcome"] == "promoted", seen

    version = Versions(open_store()).all("l")[2]
    assert (labels_of(1), labels_of(2), labels_of(3)) == (LABELS, LABELS, [*LABELS, NEW])
    findings = json.loads(store.get_bytes(f"{version.adapter_uri}/findings.json"))
    manifest = read_manifest(store, findings["dataset"]["uri"])
    assert (manifest.num_train, manifest.num_rejected, list(manifest.task.labels)) == (23, 0, [*LABELS, NEW])
    assert any(f"bank gains the labels {NEW}" in note for note in findings["evaluation"]["notes"])
    assert findings["evaluation"]["parent_accuracies"]["bank"] == without.accuracies["bank"]
    asked = [
        predict(store, "It kept my card.", lineage="l", task="bank", version=number).prompt for number in ("2", None)
    ]
    assert [NEW in prompt for prompt in asked] == [False, True]
    assert deal("adapt", "--task", "bank", "--data", str(more))["status"] == "repeat"


@pytest.mark.nightly
def test_old_test_rows_are_asked_of_each_version_by_its_own_labels(
    deal: Deal, tiny_base: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        tiny_base,
        {**BANK, "labels": LABELS},
        train={"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 3, "checkpoint_steps": 0},
    )
    run(tiny_base, CLINIC, evaluate={"max_old_rows": 5})
    deal("task", "add-label", "bank", NEW)
    asked = keep_what_is_asked(monkeypatch)
    third = run(tiny_base, {"name": "bank", "data": str(more)})
    assert third.status == "promoted" and third.dataset.new_labels == (NEW,)
    of_arrival = ("bank", False, 20)  # the champion answers what has landed, without the rows of the label that is new
    assert asked == [of_arrival, ("bank", False, 31), ("bank", True, 36), ("clinic", False, 36)]
    findings = json.loads(open_store().get_bytes(f"{Versions(open_store()).all('l')[2].adapter_uri}/findings.json"))
    notes = findings["evaluation"]["notes"]
    assert any("new labels of bank are longer than" in note for note in notes)


@pytest.mark.nightly
def test_test_rows_that_replace_forgotten_ones_may_have_the_new_label(
    deal: Deal, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tiny_base, {**BANK, "labels": LABELS})
    asyncio.run(forget(first.dataset.sha256))
    deal("task", "add-label", "bank", NEW)
    path = tmp_path / "anew.jsonl"
    rows = [{**row, "split": split} for row, split in zip(ROWS, SPLITS, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = keep_what_is_asked(monkeypatch)
    second = run(tiny_base, {"name": "bank", "data": str(path)})
    assert (second.status, second.dataset.num_test, labels_of(2)) == ("promoted", 8, [*LABELS, NEW])
    assert asked == [("bank", True, 8)] * 3, "the base model, the parent and the new version, on the same questions"
