"""Rows of each learned task are kept with the adapter, and learned again while another task is learned."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from deal_core.adapter.files import METHOD_TENSORS_FILE, MethodState
from deal_core.adapter.state import load_method_state
from deal_core.strategies.kept_rows import rows_name, unpack
from flows.adapt_result import AdaptResult
from infra.store.opening import open_store
from tasks.adaptation.evaluate import score_version
from tasks.adaptation.resume import read_findings
from tasks.lineage.frozen_rows import ANSWERS_FILE, read_answers
from tasks.lineage.history import find_version
from tasks.lineage.version_files import borrowed_adapter
from tasks.planning import plan
from tasks.spec import AdaptSpec, parse
from tests.adapting import BANK, CLINIC, evaluation_of, run, version_of

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")

TRAIN = {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 0}
WARDS = {**CLINIC, "name": "wards", "instruction": "Which ward?"}


def state_of(number: str) -> MethodState:
    """The method's state of a version of lineage `l`."""
    store = open_store()
    with borrowed_adapter(store, find_version(store, "l", number), with_method=True) as folder:
        return load_method_state(folder)


def kept_by(number: str) -> dict[str, Tensor]:
    """The kept rows of a version of lineage `l`, by the name of their tensor."""
    return dict(state_of(number).tensors)


def num_kept(number: str, *tasks: str) -> list[int]:
    """How many rows of each task a version keeps, which keeps rows of no other task."""
    kept = kept_by(number)
    assert kept.keys() == {rows_name(task) for task in tasks}
    return [len(unpack(kept[rows_name(task)])) for task in tasks]


def notes_of(result: AdaptResult) -> list[str]:
    """The notes of a version's training, the rehearsal's first."""
    return list(read_findings(open_store(), version_of(result).adapter_uri).training.notes)


@pytest.mark.usefixtures("copied_home")
def test_rows_of_both_tasks_are_kept_and_those_of_the_first_were_rehearsed(tiny_base: Path) -> None:
    """With the settings' defaults. Version 2, which its gate rejected, has the same parent as version 3."""
    assert num_kept("1", "bank") == [18], "a quarter of 72"
    assert num_kept("3", "bank", "clinic") == num_kept("2", "bank", "clinic") == [18, 18]
    assert torch.equal(kept_by("3")[rows_name("bank")], kept_by("1")[rows_name("bank")])
    assert state_of("3").stores == "data"
    uris = {number: find_version(open_store(), "l", number).adapter_uri for number in ("1", "3")}
    notes = {number: list(read_findings(open_store(), uri).training.notes) for number, uri in uris.items()}
    assert notes["1"] == [] and notes["3"][0] == "rehearsed 18 rows of one old task, 4 a step"
    assert not [note for note in notes["3"] if "gone" in note or "not rehearsed" in note]

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    labels = {row["text"]: row["label"] for row in map(json.loads, Path(BANK["data"]).read_text().splitlines())}
    with Path(CLINIC["data"]).open(newline="") as file:
        findings = {row["note"]: row["finding"] for row in csv.DictReader(file)}
    for task, right in (("bank", labels), ("clinic", findings)):
        rows = unpack(kept_by("3")[rows_name(task)])
        prompts = [tokenizer.decode(row.prompt_ids) for row in rows]
        texts = [text for prompt in prompts for text in right if text in prompt]
        assert len(set(texts)) == len(rows), "each is a training row, and none is there twice"
        answers = [tokenizer.decode(row.answer_ids, skip_special_tokens=True).strip() for row in rows]
        assert answers == [right[text] for text in texts]
        assert Counter(answers) == dict.fromkeys(right.values(), 3), "six labels, each in its share"


@pytest.mark.usefixtures("copied_home")
def test_every_test_row_judges() -> None:
    version = find_version(open_store(), "l", "3")
    evaluation = read_findings(open_store(), version.adapter_uri).evaluation.to_json()
    assert evaluation["num_rows"] == {"bank": 36, "clinic": 36}
    assert {task: len(marks) for task, marks in evaluation["parent_outcomes"].items()} == {"bank": 36, "clinic": 36}
    answers = read_answers(open_store(), version.adapter_uri).now
    assert {task: len(of_rows) for task, of_rows in answers.items()} == {"bank": 36, "clinic": 36}
    assert not [note for note in evaluation["notes"] if "judge" in note]
    open_store().delete(f"{version.adapter_uri}/{ANSWERS_FILE}")  # as `deal data delete` of another task does
    assert score_version(open_store(), version).num_rows == {"bank": 36, "clinic": 36}


@pytest.mark.usefixtures("copied_home")
def test_a_task_that_returns_keeps_rows_of_both_arrivals(tiny_base: Path, tmp_path: Path) -> None:
    """Its kept rows are rehearsed as those of any old task."""
    before = kept_by("3")
    june = tmp_path / "june.jsonl"
    rows = [{"text": f"June {number}: a card went missing.", "label": "lost card"} for number in range(60)]
    june.write_text("".join(json.dumps({**row, "split": "train"}) + "\n" for row in rows))
    result = run(tiny_base, {"name": "bank", "data": str(june)})
    assert result.status == "promoted" and result.dataset.num_train == 60
    assert notes_of(result)[0] == "rehearsed 36 rows of 2 old tasks, 4 a step"
    assert num_kept("4", "bank", "clinic") == [20, 18], "a quarter of 18 and 60"
    after = kept_by("4")
    assert torch.equal(after[rows_name("clinic")], before[rows_name("clinic")])
    old = [row.prompt_ids for row in unpack(before[rows_name("bank")])]
    kept = [row.prompt_ids for row in unpack(after[rows_name("bank")])]
    assert 0 < sum(prompt in old for prompt in kept) < len(kept)


@pytest.mark.usefixtures("copied_home")
def test_kept_rows_that_a_setting_drops_are_rehearsed_once_more_and_then_gone(tiny_base: Path) -> None:
    result = run(tiny_base, WARDS, rehearsal={"rows": 0})
    assert notes_of(result)[0] == "rehearsed 36 rows of 2 old tasks, 4 a step" and kept_by("4") == {}
    assert state_of("4").stores == "nothing"
    files = open_store().list(version_of(result).adapter_uri)
    assert not [info.key for info in files if info.key.endswith(METHOD_TENSORS_FILE)], "no row is stored"
    (note,) = (note for note in notes_of(result) if "gone" in note)
    assert note == "kept rows of 2 tasks are gone: rehearsal.rows is 0, or the strategy keeps none"
    assert "settings that differ from version 3's: rehearsal.rows 0 (before: 50)" in evaluation_of(result)["notes"]


@pytest.mark.usefixtures("copied_home")
def test_a_plan_counts_the_rows_that_are_rehearsed(tiny_base: Path) -> None:
    settings = {"lineage": "l", "base_model": str(tiny_base), "train": TRAIN}
    usual = plan(open_store(), parse(AdaptSpec, {**settings, "task": WARDS}, "test"), probe=False)
    assert (usual.rehearsed_per_step, usual.num_kept) == (4, 18)
    assert "the parent answers rows of old tasks: a model reads 36 texts before the training" in usual.notes
    spec = parse(AdaptSpec, {**settings, "task": WARDS, "rehearsal": {"rows": 9, "per_step": 2}}, "test")
    fewer = plan(open_store(), spec, probe=False)
    assert (fewer.rehearsed_per_step, fewer.num_kept) == (2, 9)
