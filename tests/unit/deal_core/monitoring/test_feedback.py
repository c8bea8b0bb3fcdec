"""The form of feedback, and the spelling of its labels."""

from __future__ import annotations

from typing import Any

import pytest

from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.monitoring.feedback import KEYS, Source, read_entry

ID = "0123456789abcdef" * 2
TASKS = {"bank": TaskSchema(name="bank", labels=("Card lost", "b")), "talk": TaskSchema(name="talk", format="chat")}


def read(values: Any, source: Source = "command") -> Any:
    return read_entry(values, "Row 2", source=source, now=5.0)


def test_cells_of_a_csv_file_are_read_as_their_values() -> None:
    found = read({"id": f"cmpl-{ID}", "label": "", "is_right": "No", "is_random": "1", "reviewer": " Jo "}).feedback
    assert (found.id, found.label, found.is_right, found.is_random, found.reviewer) == (ID, None, False, True, "Jo")
    found = read({"id": ID, "label": "b", "is_right": float("nan"), "other": "x"}).feedback
    assert (found.label, found.is_right, found.is_random, found.reviewer) == ("b", None, False, None)


def test_a_person_stands_behind_a_file_and_behind_what_a_reviewer_sent() -> None:
    entry = {"id": ID, "label": "b"}
    assert read(entry).feedback.is_reviewed and read({**entry, "reviewer": "Jo"}, "api").feedback.is_reviewed
    assert not read(entry, "api").feedback.is_reviewed


def test_a_label_gets_the_tasks_spelling_and_another_is_refused() -> None:
    entry = read({"id": ID, "label": "card  LOST"})
    for task in ("bank", None):
        assert entry.check_against(TASKS, task, "Row 2").label == "Card lost"
    with pytest.raises(ConfigError, match="Row 2 gives a label, and the task has none"):
        entry.check_against(TASKS, "talk", "Row 2")
    answer = read({"id": ID, "answer": "Hello"})
    for task in ("talk", None):
        assert answer.check_against(TASKS, task, "Row 2").label == "Hello"
    with pytest.raises(ConfigError, match="Row 2 gives an answer as free text"):
        answer.check_against(TASKS, "bank", "Row 2")
    for task in ("bank", None):
        with pytest.raises(ConfigError, match=r"does not have\. Its labels are: Card lost, b\."):
            read({"id": ID, "label": "c"}).check_against(TASKS, task, "Row 2")


@pytest.mark.parametrize(
    "values",
    [[], "x", {}, {"label": "b"}, {"id": ID}, {"id": ID.upper(), "label": "b"}, {"id": ID + "\n0", "label": "b"},
     {"id": f"{ID}/..", "label": "b"}, {"id": 3, "label": "b"}, {"id": ID, "label": 3}, {"id": ID, "label": ["b"]},
     {"id": ID, "label": "b" * 100_001}, {"id": ID, "label": "b", "answer": "b"}, {"id": ID, "is_right": 2},
     {"id": ID, "is_right": True, "reviewer": {"a": 1}}, {"id": ID, "is_right": True, "is_random": "perhaps"}],
)  # fmt: skip
def test_another_form_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Row 2"):
        read(values)


def test_an_unknown_key_of_a_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="lable; the keys are " + ", ".join(KEYS)):
        read({"id": ID, "label": "b", "lable": "b"}, "api")
