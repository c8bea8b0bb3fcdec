"""The names of the columns of a file to fill in."""

from __future__ import annotations

import json

import pytest

from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from tasks.monitoring.feedback import _in_names_of_feedback, answer_column
from tasks.monitoring.select import _check_columns, _to_fill_in

LABELS = TaskSchema(name="t", labels=("a", "b"), columns={"text": "note", "label": "finding"})
FREE = TaskSchema(name="t", format="completion", columns={"completion": "reply"})
CHAT = TaskSchema(name="t", format="chat", columns={"messages": "talk"})
ASKED = [{"role": "user", "content": "Hi", "tools": [{"name": "add"}]}]


@pytest.mark.parametrize(
    ("schema", "text", "wanted", "fed"),
    [
        (LABELS, "x", {"note": "x", "finding": ""}, "label"),
        (FREE, "x", {"prompt": "x", "reply": ""}, "answer"),
        (
            CHAT,
            json.dumps(ASKED),
            {"talk": [{"role": "user", "content": "Hi"}], "tools": [{"name": "add"}], "answer": ""},
            "answer",
        ),
        (
            TaskSchema(name="t", labels=("a", "b"), columns={"label": "answer"}),
            "x",
            {"text": "x", "answer": ""},
            "label",
        ),
        (
            TaskSchema(name="t", format="completion", columns={"context": "about", "split": "part"}),
            "x",
            {"prompt": "x", "completion": "", "about": "", "part": "train"},
            "answer",
        ),
    ],
)
def test_feedback_reads_the_column_that_a_person_has_filled_in(
    schema: TaskSchema, text: str, wanted: dict[str, object], fed: str
) -> None:
    _check_columns(schema)
    row = _to_fill_in(schema, {"id": "i", "input": text, "output": "b", "confidence": 0.51239, "is_random": True})
    assert row == {"id": "i", **wanted, "champion_answer": "b", "confidence": 0.5124, "is_random": True}
    own = [(answer_column(schema), schema)]
    assert _in_names_of_feedback(row, own) == row, "an empty cell says nothing"
    assert _in_names_of_feedback({**row, answer_column(schema): "a"}, own)[fed] == "a"


def test_columns_of_feedback_come_before_the_tasks_own_name() -> None:
    row = {"id": "i", "label": "", "finding": "a"}
    assert _in_names_of_feedback(row, [("finding", LABELS)]) == row, "the file has a column for feedback"


@pytest.mark.parametrize(
    "columns", [{"text": "answer"}, {"text": "id"}, {"label": "confidence"}, {"label": "reviewer"}, {"text": "label"}]
)
def test_a_column_with_two_meanings_is_refused(columns: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="Task 't' calls a column"):
        _check_columns(TaskSchema(name="t", labels=("a", "b"), columns=columns))
