"""A task whose labels change their meaning: it is judged on renewed test rows, and its earlier rows stay in sight."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from flows.adapt_result import AdaptResult
from flows.forget import forget
from infra.store.opening import open_store
from tasks.lineage.frozen_rows import read_answers
from tests.adapting import PASS, page_of, record_of, run, version_of
from tests.in_process import deal_json

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")

GATE = {**PASS, "min_gain_over_champion_points": 0.0, "max_drop_points": 5.0, "min_gain_points": 10.0}
TRAIN = {"max_steps": 60, "learning_rate": 0.03, "max_prompt_tokens": 64, "max_answer_tokens": 6, "checkpoint_steps": 0}


def file_of(folder: Path, name: str, warm: str, cold: str) -> dict[str, Any]:
    """Thirty rows: texts about red things have the label `warm`, texts about blue things `cold`."""
    rows = [
        {"text": f"{name} {number}: a {colour} card", "label": label, "split": "test" if number % 3 == 0 else "train"}
        for number in range(15)
        for colour, label in (("red", warm), ("blue", cold))
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "colours", "data": str(path), "labels": ["warm", "cold"], "instruction": "Which?"}


def learn(base: Path, task: dict[str, Any], train: dict[str, Any] = TRAIN, **gate: Any) -> AdaptResult:
    return run(base, task, strategy="seq_lora", train=train, gate={**GATE, **gate})


def renew() -> Any:
    return deal_json("task", "renew-tests", "colours", "--lineage", "l")


def test_a_shifted_task_is_rejected_by_its_old_rows_and_promoted_by_renewed_ones(
    tiny_base: Path, tmp_path: Path
) -> None:
    before = learn(tiny_base, file_of(tmp_path, "january", "warm", "cold"))
    assert before.status == "promoted" and before.accuracies["colours"] > 0.8

    shifted = learn(tiny_base, file_of(tmp_path, "june", "cold", "warm"))
    assert shifted.rejected and any("colours: accuracy" in reason for reason in shifted.reasons)

    assert renew() == {"lineage": "l", "task": "colours", "num_test": 10, "was_asked": False}
    now = learn(tiny_base, file_of(tmp_path, "july", "cold", "warm"))
    assert now.status == "promoted" and now.accuracies["colours"] > 0.8 and now.accuracies["colours.old-1"] < 0.5
    page = page_of(now)[1]
    assert "deal task renew-tests asked for them; the 10 rows before stay as colours.old-1" in page

    record = record_of(now)
    assert [(each.name, each.of, each.num_test) for each in record.slices] == [("colours.old-1", "colours", 10)]
    assert record.matrix.average_accuracy == now.accuracies["colours"], "the task alone counts"
    assert record.matrix.forgetting is None

    # The request has ended: the next arrival is judged on July's rows, and both slices are measured again.
    still = {**TRAIN, "max_steps": 1, "learning_rate": 1e-6}  # it answers as its parent does
    later = learn(tiny_base, file_of(tmp_path, "august", "cold", "warm"), still)
    assert later.status == "promoted" and set(later.accuracies) == {"colours", "colours.old-1"}
    assert record_of(later).slices == record.slices


@pytest.mark.nightly
def test_a_limit_for_earlier_rows_can_be_set(tiny_base: Path, tmp_path: Path) -> None:
    learn(tiny_base, file_of(tmp_path, "january", "warm", "cold"))
    renew()
    limited = learn(tiny_base, file_of(tmp_path, "june", "cold", "warm"), max_old_slice_drop_points=50.0)
    assert limited.rejected
    (reason,) = limited.reasons
    assert reason.startswith("colours.old-1: accuracy fell by") and reason.endswith("; the limit is 50.0 points.")


@pytest.mark.nightly
def test_earlier_rows_can_be_forgotten_and_the_lineage_learns_on(tiny_base: Path, tmp_path: Path) -> None:
    first = learn(tiny_base, file_of(tmp_path, "january", "warm", "cold"))
    renew()
    second = learn(tiny_base, file_of(tmp_path, "june", "warm", "cold"), min_gain_points=-100.0)
    answered = read_answers(open_store(), version_of(second).adapter_uri).now
    assert len(answered["colours"]) == len(answered["colours.old-1"]) == 10
    asyncio.run(forget(first.dataset.sha256))
    left = read_answers(open_store(), version_of(second).adapter_uri).now
    assert left["colours"] == answered["colours"] and not left["colours.old-1"]
    third = learn(tiny_base, file_of(tmp_path, "july", "warm", "cold"), min_gain_points=-100.0)
    assert set(third.accuracies) == {"colours"} and third.status == "promoted"
    record = record_of(third)
    assert record.matrix.tasks == ("colours", "colours.old-1") and record.matrix.rows[-1][1] is None
