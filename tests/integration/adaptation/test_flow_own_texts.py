"""With `memory: tests`, as a new lineage has it, old tasks are asked about their own test rows, which do not judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deal_core.strategies import questions
from deal_core.strategies.strategy import TaskContext
from tasks.adaptation.evaluate import score_version
from tasks.context import current_store
from tasks.lineage.frozen_rows import ANSWERS_FILE, read_answers
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.planning import plan
from tasks.progress import LogReporter
from tasks.spec import AdaptSpec, parse
from tasks.validate import spec_to_check, validate
from tests.adapting import BANK, CLINIC, evaluation_of, run

pytestmark = pytest.mark.usefixtures("prefect_api", "home")
NUM_JUDGING = 20
"""So many of a task's 36 test rows judge; the others may teach."""


@pytest.fixture(autouse=True)
def spare_rows(few_rows_judge: Callable[[int], None]) -> None:
    few_rows_judge(NUM_JUDGING)


def test_texts_that_may_teach_do_not_judge(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(LogReporter, "said", lambda _, message: said.append(message.strip()))
    taught: list[dict[str, list[str]]] = []
    make = questions.make_rehearsal

    def record_texts(config: Any, model: Any, context: TaskContext, *rest: Any) -> Any:
        taught.append({each.task.name: list(each.rows["input"]) for each in context.old_texts})
        return make(config, model, context, *rest)

    monkeypatch.setattr(questions, "make_rehearsal", record_texts)
    first, result = run(tiny_base, BANK), run(tiny_base, CLINIC)
    assert first.status == "promoted"
    spared = f"{NUM_JUDGING} of 36 test rows of bank judge; the texts of the others may teach"
    assert spared in evaluation_of(first)["notes"] and said.count(spared) == 1
    assert (result.status, result.version) == ("promoted", "2")
    info = find_version(current_store(), "l", "2")
    adapter_uri = info.adapter_uri
    tasks = read_record(current_store(), adapter_uri).tasks
    judging = {each.schema.name: NUM_JUDGING for each in tasks}
    assert evaluation_of(result)["num_rows"] == judging
    assert [set(each) for each in taught] == [set(), {"bank"}], "the new task's own rows are not asked about"
    assert len(taught[1]["bank"]) == tasks[0].num_test - NUM_JUDGING
    (note,) = (note for note in evaluation_of(result)["notes"] if "questions about old tasks" in note)
    assert note.startswith("rehearsed 16 questions about old tasks (sets: 1)")
    assert {name: len(each) for name, each in read_answers(current_store(), adapter_uri).now.items()} == judging

    current_store().delete(f"{adapter_uri}/{ANSWERS_FILE}")  # as `deal data delete` of another task does
    assert score_version(info).num_rows == judging


@pytest.mark.nightly
def test_rows_that_taught_by_their_texts_judge_no_later_version_either(tiny_base: Path, tmp_path: Path) -> None:
    """A task with free answers spares rows as well. The second version is learned with another memory."""
    rows = [
        {
            "prompt": f"Order {n}: the tap in flat {n % 7} drips.",
            "completion": f"tap, flat {n % 7}",
            "split": "test" if n % 2 else "train",
        }
        for n in range(60)
    ]
    file = tmp_path / "orders.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tiny_base, {"name": "orders", "data": str(file)}).status == "promoted"
    second = run(tiny_base, BANK, memory="none")
    assert second.status == "promoted"
    judging = evaluation_of(second)["num_rows"]
    assert judging == {"orders": 20, "bank": 20}
    adapter_uri = find_version(current_store(), "l", "2").adapter_uri
    assert read_record(current_store(), adapter_uri).spared == "all"


def test_plan_and_validation_know_which_rows_teach(tiny_base: Path, few_rows_judge: Callable[[int], None]) -> None:
    few_rows_judge(7)

    def few(lineage: str = "l") -> bool:
        found = validate(*spec_to_check(BANK["data"], task="other", test_data=BANK["test_data"], lineage=lineage))
        return any(warning.startswith("7 test rows can tell") for warning in found.warnings)

    run(tiny_base, BANK, memory="none")
    assert not few() and few("new")
    known = validate(*spec_to_check(BANK["data"], task="bank", test_data=BANK["test_data"], lineage="l"))
    assert not [warning for warning in known.warnings if "can tell" in warning], "its own test rows judge"
    run(tiny_base, BANK, memory="tests", again=True)
    assert few()
    same = parse(AdaptSpec, {"lineage": "l", "base_model": str(tiny_base), "task": BANK}, "test")
    assert plan(same, probe=False).rehearsed_per_step == 0, "the only task is asked about by no other text"
    spec = parse(AdaptSpec, {"lineage": "l", "base_model": str(tiny_base), "task": CLINIC}, "test")
    assert plan(spec, probe=False).rehearsed_per_step == 4
    notes = plan(spec, probe=False).notes
    assert "the parent answers about old tasks: a model reads 29 texts before the training" in notes


@pytest.mark.nightly
def test_several_processes_ask_about_the_same_texts(tiny_base: Path) -> None:
    train = {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 0}
    run(tiny_base, BANK)
    two = run(tiny_base, CLINIC, train={**train, "num_processes": 2})
    notes = evaluation_of(two)["notes"]
    assert any(note.startswith("rehearsed 16 questions about old tasks (sets: 1)") for note in notes)
