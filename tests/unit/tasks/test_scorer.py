"""Who answers test rows, and what is said of answers that one label has taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from deal_core.data.schema import TaskSchema
from deal_core.evaluation.evaluate import Given, TaskEvaluation
from deal_core.evaluation.metrics import LabelFigures
from deal_core.training.jobs import AnswerResult
from infra.store.opening import open_store
from tasks.lineage.frozen_rows import TestSet
from tasks.references import BaseRef
from tasks.scorer import Processes, Scored, Scorer, collapse_notes


@pytest.mark.parametrize(("recentred", "is_gain"), [(0.5, False), (0.54, False), (0.75, True)])
def test_the_cost_is_named_if_it_is_a_row(recentred: float, is_gain: bool) -> None:
    """Of ten rows one is a tenth."""
    labels = (
        LabelFigures(label="closed", num_rows=5, recall=1.0, share=1.0),
        LabelFigures(label="open", num_rows=5, recall=0.0, share=0.0),
    )
    found = TaskEvaluation(
        task="tickets",
        accuracy=0.5,
        rouge1=0.5,
        num_rows=10,
        majority_rate=0.5,
        answers=("closed",) * 10,
        outcomes=(1.0,) * 5 + (0.0,) * 5,
        labels=labels,
    )
    (note,) = collapse_notes(Scored({"tickets": found}, {}, None, recentred={"tickets": recentred}))
    first = "tickets: 100 % of the answers are 'closed', but 50 % of the test rows are"
    often = "If every label were answered as often as it occurs, accuracy would be 75.0 % instead of 50.0 %"
    assert note == (f"{first}. {often}" if is_gain else first)


@pytest.mark.usefixtures("home")
def test_the_base_model_is_not_loaded_where_other_processes_answer(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the base model was loaded")

    def launch(*args: Any) -> AnswerResult:
        return AnswerResult(answers=((Given("lost", None), Given("late", None)),), perplexity=None)

    monkeypatch.setattr("tasks.base.load", refuse)
    monkeypatch.setattr("tasks.scorer.launch_job", launch)
    base = BaseRef(source=str(tiny_base), name="tiny", sha256="b" * 64)
    scorer = Scorer(open_store(), base, processes=Processes(number=2, jobs_folder="jobs", folder=tmp_path))
    rows = Dataset.from_dict({"input": ["a", "b"], "output": ["lost", "lost"], "sha256": ["1", "2"]})
    schema = TaskSchema(name="calls", labels=("late", "lost"), instruction="Which?")
    asked = TestSet(schema=schema, rows=rows, max_prompt_tokens=64, max_new_tokens=1)
    found = scorer.score(None, [asked])
    assert found.accuracies == {"calls": 0.5} and found.answers == {"calls": {"1": "lost", "2": "late"}}
    assert scorer.divergence_from_base(tmp_path, asked) is None
    assert scorer.count_too_long(asked, ["lost", "x", "as long as a sentence is"]) >= 1, "by the tokenizer"
