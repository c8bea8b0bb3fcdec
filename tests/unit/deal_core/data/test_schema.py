"""Schemas refuse what cannot work, name the remedy, and come back from JSON as they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from deal_core.data.columns import resolve_columns
from deal_core.data.schema import TaskSchema, label_key
from deal_core.errors import ConfigError, DataValidationError


class Spec(BaseModel):
    task: TaskSchema


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "../up"}, "task.name is '../up'"),
        ({"name": "a\n"}, "task.name"),
        ({"name": "a" * 65}, "1 to 64"),
        ({"format": "xml"}, "task.format is 'xml'; use one of labelled, completion, chat, auto"),
        ({"labels": ("A", "b", " a ")}, "'A' and ' a '"),
        ({"labels": ("a", " ")}, "a label is one line and not empty"),
        ({"labels": ("a\nb",)}, "a label is one line"),
        ({"format": "completion", "labels": ("a",)}, "only labelled tasks have labels"),
        ({"template": "{text} {optoins}"}, "nothing else in braces"),
        ({"template": "{text"}, "task.template cannot be read"),
        ({"template": "{text}{text}"}, "{text} 2 times"),
        ({"format": "chat", "template": "{text}"}, "chat template"),
        ({"columns": {"txt": "body"}}, "task.columns names txt"),
        ({"prompt": "poem"}, "task.prompt is 'poem'; use plain or chat"),
    ],
)
def test_a_task_that_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TaskSchema(**{"name": "t", **fields})
    assert message in str(error.value)
    with pytest.raises(ValidationError):
        Spec.model_validate({"task": {"name": "t", **fields}})


@pytest.mark.parametrize("name", ["a", "SST-2", "0day", "a.b_c-d", "a" * 64])
def test_names_that_are_safe_in_a_path_are_taken(name: str) -> None:
    assert TaskSchema(name=name).name == name


def test_unknown_keys_in_a_spec_are_errors() -> None:
    with pytest.raises(ValidationError, match="instructions"):
        Spec.model_validate({"task": {"name": "t", "instructions": "x"}})


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"columns": {"text": "Body"}}, True),
        ({"instruction": "i"}, False),
        ({"template": "{text}"}, False),
        ({"prompt": "chat"}, False),
        ({"labels": ("b", "a")}, False),
        ({"format": "completion", "labels": ()}, False),
    ],
)
def test_a_schema_s_digest_tells_how_it_asks(change: dict[str, Any], is_same: bool) -> None:
    plain = TaskSchema(name="t", labels=("a", "b"))
    assert (replace(plain, **change).sha256 == plain.sha256) == is_same


def test_the_form_of_prompts_is_stored() -> None:
    told, chat = TaskSchema(name="t", prompt="chat"), TaskSchema(name="t", format="chat", prompt="chat")
    assert told.to_json()["prompt"] == "chat" and TypeAdapter(TaskSchema).validate_python(told.to_json()) == told
    assert told.as_asked().prompt == "chat", "clients must render the same prompt"
    assert chat == TaskSchema(name="t", format="chat") and chat.sha256 == TaskSchema(name="t", format="chat").sha256


def test_labels_are_added_after_those_that_there_are_and_once() -> None:
    task = TaskSchema(name="t", labels=("b", "a"), instruction="Which?")
    assert task.with_labels([" c ", "B", "c", "0"]) == replace(task, labels=("b", "a", "c", "0"))
    assert task.with_labels([]) == task
    for wrong in ("", " ", "one\ntwo"):
        with pytest.raises(ConfigError, match="a label is one line and not empty"):
            task.with_labels([wrong])
    with pytest.raises(ConfigError, match="only labelled tasks have labels"):
        TaskSchema(name="t", format="completion").with_labels(["c"])


def test_labels_are_the_same_across_case_blanks_and_unicode_forms() -> None:
    assert label_key(" Caf\u00e9  au LAIT ") == label_key("cafe\u0301 au lait")
    assert label_key("STRASSE") == label_key("straße")
    assert label_key("a") != label_key("b")


@pytest.mark.parametrize(
    ("columns", "task_format", "names"),
    [
        (("text", "label"), "labelled", {"text": "text", "label": "label"}),
        (("id", " Body ", "CATEGORY"), "labelled", {"text": " Body ", "label": "CATEGORY"}),
        (("sentence", "intent", "Split"), "labelled", {"text": "sentence", "label": "intent", "split": "Split"}),
        (("instruction", "response"), "completion", {"prompt": "instruction", "completion": "response"}),
        (("question", "answer"), "completion", {"prompt": "question", "completion": "answer"}),
        (("messages",), "chat", {"messages": "messages"}),
        (("sentence", "text", "label"), "labelled", {"text": "text", "label": "label"}),
        (("text", "label", "question", "input"), "labelled", {"text": "text", "label": "label"}),
    ],
)
def test_columns_and_format_are_found_by_convention(
    columns: tuple[str, ...], task_format: str, names: dict[str, str]
) -> None:
    found = resolve_columns(columns, TaskSchema(name="t", format="auto"), "f.csv")
    assert (found.format, dict(found.names)) == (task_format, names)


def test_columns_that_the_task_names_win() -> None:
    task = TaskSchema(name="t", format="auto", columns={"text": "q", "label": "z"})
    assert dict(resolve_columns(("text", "label", "q", "z"), task, "f").names) == {"text": "q", "label": "z"}


@pytest.mark.parametrize(
    ("columns", "fields", "message"),
    [
        (
            ("text", "y"),
            {},
            "f.csv has the columns 'text', 'y', and labelled rows need text and label; no column is named",
        ),
        (("x", "y"), {"format": "auto"}, "completion rows need prompt and completion or chat rows need messages"),
        (("text", "label", "messages"), {"format": "auto"}, "more than one format (labelled, chat)"),
        (("text", "label"), {"columns": {"text": "body"}}, "no column 'body', which task.columns gives for text"),
        (("text", "label"), {"columns": {"label": "text"}}, "two meanings"),
        (("Text", "TEXT", "label"), {}, "2 columns that could be text"),
        (("question", "input", "output"), {"format": "auto"}, "could be prompt: 'question', 'input'"),
        (tuple(f"c{i}" for i in range(500)), {}, "(500 in all)"),
        (("message no 1", "a"), {}, "if its first line is a row and no header, put the columns' names above it"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_name(
    columns: tuple[str, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataValidationError) as error:
        resolve_columns(columns, TaskSchema(name="t", **fields), "f.csv", include_texts=True)
    assert message in str(error.value)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("named", [{}, {"text": "note"}, {"text": "report", "label": "Finding"}])
def test_without_texts_only_names_that_are_looked_for_are_quoted(named: dict[str, str]) -> None:
    """Without a header, a row's texts would be read as column names."""
    columns = (" Finding ", "Topic", "I am Jane Doe", "4111")
    with pytest.raises(DataValidationError) as error:
        resolve_columns(columns, TaskSchema(name="t", columns=named), "f.jsonl")
    message = str(error.value)
    assert "Jane" not in message and "4111" not in message
    assert "4 columns" in message and "'Topic'" in message and ("Finding " in message) == ("label" in named)
    assert "first line" not in message, "of JSON lines it names no columns"


def test_a_column_of_the_exact_name_wins_over_another_case() -> None:
    assert dict(resolve_columns(("Text", "text", "label"), TaskSchema(name="t"), "f").names)["text"] == "text"


def test_a_task_with_labels_is_labelled_whatever_else_the_file_has() -> None:
    task = TaskSchema(name="t", format="auto", labels=("a", "b"))
    assert resolve_columns(("messages", "text", "label"), task, "f").format == "labelled"
