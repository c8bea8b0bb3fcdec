"""A task's test rows grow by later accepted versions, and judge from the version after on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from deal_core.data.rows import stored_input_digest
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from flows.adapt_result import AdaptResult
from flows.forget import forget
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.lineage.datasets import learned_inputs
from tasks.lineage.frozen_rows import load_added, read_answers
from tests.adapting import FAIL, evaluation_of, page_of, record_of, run, version_of

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")

AIM = 40
Rows = list[dict[str, str]]


def rows_of(month: str, number: int) -> Rows:
    return [
        {"text": f"{month} {n}: a {('red', 'blue')[n % 2]} card", "label": ("warm", "cold")[n % 2]}
        for n in range(number)
    ]


def learn(base: Path, folder: Path, month: str, rows: Rows, **more: Any) -> AdaptResult:
    file = folder / f"{month}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "colours",
        "data": str(file),
        "labels": ["warm", "cold"],
        "instruction": "Which?",
        **more.pop("task", {}),
    }
    return run(base, task, data={"test_rows": AIM}, **more)


def sizes(result: AdaptResult) -> list[int | None]:
    """The number of test rows behind each figure of the task: of the base model, then of each version."""
    return [row[0].num_rows for row in AccuracyMatrix.from_json(result.matrix).cells]


def answered(result: AdaptResult) -> int:
    return len(read_answers(open_store(), version_of(result).adapter_uri).now["colours"])


def test_test_rows_grow_by_accepted_versions_and_judge_from_the_next_one_on(tiny_base: Path, tmp_path: Path) -> None:
    store, april = open_store(), rows_of("april", 60)
    first = learn(tiny_base, tmp_path, "april", april)
    assert (first.dataset.num_test, first.dataset.num_added, first.added) == (20, 0, None), "a third of few rows"

    # A fifth of the new texts of May is added. Texts of April, which are learned or test rows already, are not.
    repeated = [{**row, "label": "warm"} for row in april[:30]]
    may = learn(tiny_base, tmp_path, "may", [*repeated, *rows_of("may", 80)])
    assert may.status == "promoted" and may.dataset.num_added == 16
    assert may.added is not None and may.added.num_rows == 16
    assert may.arrival is not None and may.arrival.num_rows == 80, "the champion answers those that are added too"
    assert sizes(may) == [20, 20, 20] and evaluation_of(may)["num_rows"] == {"colours": 20}, "they do not judge yet"
    assert "colours gains 16 test rows" in page_of(may)[1] and answered(may) == 36
    (known,) = record_of(may).tasks
    texts = load_added(store, known).rows["input"][:]
    assert len(texts) == 16 and all(text.startswith("may") for text in texts)
    trained = learned_inputs(store, Versions(store).all("l"), "colours")
    assert not trained & {stored_input_digest("labelled", text) for text in texts}

    rejected = learn(tiny_base, tmp_path, "june", rows_of("june", 60), gate=FAIL)
    assert rejected.rejected and rejected.added is not None

    # The rows of May judge July; those of the rejected June do not. July adds what is lacking.
    july = learn(tiny_base, tmp_path, "july", rows_of("july", 60))
    assert july.added is not None and july.added.num_rows == AIM - 36
    evaluation = evaluation_of(july)
    assert evaluation["num_rows"] == {"colours": 36} and len(evaluation["parent_outcomes"]["colours"]) == 36
    assert sizes(july) == [20, 20, 20, 36]
    april_part, may_part = record_of(july).tasks[0].tests
    assert april_part.base_accuracy is not None and may_part.base_accuracy == may.added.base_accuracy
    right = 20 * april_part.base_accuracy + 16 * may_part.base_accuracy
    assert evaluation["base_accuracy"] == pytest.approx(right / 36)
    debt = evaluation["debts"]["colours"]
    assert debt["paired"]["num_rows"] == {first.version: 20, may.version: 36}[debt["since"]], "rows that both answered"
    ((share, number),) = evaluation["matrix"]["on_fewer"]["colours"]
    answers = read_answers(store, version_of(july).adapter_uri).now["colours"]
    assert (number, len(answers)) == (20, AIM)
    outcome = evaluation["outcomes"]["colours"]
    assert share == sum(map(int, outcome[:20])) / 20


@pytest.mark.nightly(minutes=4)
def test_deleted_test_rows_go_with_the_answers_to_them_and_the_task_lacks_some_again(
    tiny_base: Path, tmp_path: Path
) -> None:
    first, may, july = (
        learn(tiny_base, tmp_path, month, rows_of(month, number))
        for month, number in (("april", 60), ("may", 80), ("july", 60))
    )
    assert [answered(each) for each in (first, may, july)] == [20, 36, AIM]
    plan = asyncio.run(forget(may.dataset.sha256)).plan
    assert plan.unjudged == () and [answered(each) for each in (first, may, july)] == [20, 20, AIM - 16]
    assert asyncio.run(forget(may.dataset.sha256)).plan.held == (), "nothing is left to delete"
    august = learn(tiny_base, tmp_path, "august", rows_of("august", 60))
    assert august.status == "promoted" and evaluation_of(august)["num_rows"] == {"colours": AIM - 16}
    assert [part.num_rows for part in record_of(august).tasks[0].tests] == [20, 4]
    assert august.added is not None and august.added.num_rows == 12

    full = learn(tiny_base, tmp_path, "september", rows_of("september", 60))
    assert full.added is not None and full.added.num_rows == 4
    again = learn(tiny_base, tmp_path, "october", rows_of("october", 60))
    assert (again.added, again.dataset.num_test) == (None, 0), "the aim is reached"
    assert evaluation_of(again)["num_rows"] == {"colours": AIM}
