"""With `train.recentre_steps` a version learns its own re-centred answers, on test rows that then do not judge it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.adaptation.evaluate import score_version
from tasks.context import current_store
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tests.adapting import BANK, CLINIC, evaluation_of, run

pytestmark = pytest.mark.usefixtures("prefect_api", "home")
TRAIN = {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 0}


def test_the_texts_that_a_version_learned_its_answers_on_do_not_judge_it(
    tiny_base: Path, few_rows_judge: Callable[[int], None]
) -> None:
    few_rows_judge(20)  # of 36
    assert run(tiny_base, BANK, memory="none").status == "promoted"
    result = run(tiny_base, CLINIC, train={**TRAIN, "recentre_steps": 2})
    assert (result.status, result.version) == ("promoted", "2")
    info = find_version(current_store(), "l", "2")
    tasks = read_record(current_store(), info.adapter_uri).tasks
    evaluation = evaluation_of(result)
    judging = {each.schema.name: 20 for each in tasks}
    assert evaluation["num_rows"] == judging
    assert {name: len(each) for name, each in evaluation["parent_outcomes"].items()} == judging
    assert any(note.startswith("re-centred the labels of 2 tasks in 2 steps") for note in evaluation["notes"])

    again = score_version(info)
    assert again.accuracies == again.recorded

    assert run(tiny_base, CLINIC, train={**TRAIN, "recentre_steps": 3}, again=True).version == "3"
    other = find_version(current_store(), "l", "3")
    assert other.adapter_sha256 != info.adapter_sha256
