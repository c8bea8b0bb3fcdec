"""Schemas refuse what cannot work, and columns are found by the task or by their names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from deal_core.data.columns import resolve_columns
from deal_core.data.rows import row_digest, row_digests, stored_input_digest
from deal_core.data.schema import TaskSchema, label_key
from deal_core.errors import ConfigError, DataValidationError


class Spec(BaseModel):
    task: TaskSchema


def task_of(**fields: Any) -> TaskSchema:
    return TaskSchema(**{"name": "t", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "../up"}, "task.name is '../up'"),
        ({"name": "a\n"}, "task.name"),
        ({"name": "a" * 65}, "1 to 64"),
        ({"format": "xml"}, "task.format is 'xml'"),
        ({"labels": ("A", "b", " a ")}, "'A' and ' a '"),
        ({"labels": ("a", " ")}, "not empty"),
        ({"labels": ("a\nb",)}, "one line"),
        ({"format": "completion", "labels": ("a",)}, "only labelled tasks have labels"),
        ({"template": "{text} {optoins}"}, "nothing else in braces"),
        ({"template": "{text"}, "task.template cannot be read"),
        ({"template": "{text}{text}"}, "{text} 2 times"),
        ({"format": "chat", "template": "{text}"}, "chat template"),
        ({"columns": {"txt": "body"}}, "task.columns names txt"),
        ({"prompt": "poem"}, "task.prompt is 'poem'"),
        ({"metric": "bleu"}, "task.metric is 'bleu'"),
        ({"assistant_turns": "none"}, "task.assistant_turns is 'none'"),
    ],
)
def test_a_task_that_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_of(**fields)
    assert message in str(error.value)
    for unknown in (fields, {"instructions": "x"}):
        with pytest.raises(ValidationError):
            Spec.model_validate({"task": {"name": "t", **unknown}})


@pytest.mark.parametrize("name", ["a", "SST-2", "0day", "a.b_c-d", "a" * 64])
def test_names_that_are_safe_in_a_path_are_taken(name: str) -> None:
    assert task_of(name=name).name == name


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
    plain = task_of(labels=("a", "b"))
    changed = replace(plain, **change)
    assert (changed.sha256 == plain.sha256) == is_same
    assert TypeAdapter(TaskSchema).validate_python(changed.to_json()) == changed
    assert (changed.as_asked().prompt, changed.as_asked().columns) == (changed.prompt, {})


def test_a_chat_has_one_form_of_prompts() -> None:
    assert task_of(format="chat", prompt="chat") == task_of(format="chat")


def test_labels_are_added_after_those_that_there_are_and_once() -> None:
    task = task_of(labels=("b", "a"), instruction="Which?")
    assert task.with_labels([" c ", "B", "c", "0"]) == replace(task, labels=("b", "a", "c", "0"))
    assert task.with_labels([]) == task
    for wrong in ("", " ", "one\ntwo"):
        with pytest.raises(ConfigError):
            task.with_labels([wrong])
    with pytest.raises(ConfigError):
        task_of(format="completion").with_labels(["c"])


def test_labels_are_the_same_across_case_blanks_and_unicode_forms() -> None:
    assert label_key(" Caf\u00e9  au LAIT ") == label_key("cafe\u0301 au lait")
    assert label_key("STRASSE") == label_key("straße")
    assert label_key("a") != label_key("b")


@pytest.mark.parametrize("text", ["Caf\u00e9 au lait", " Cafe\u0301  au\tlait\n", "Caf\u00e9\u00a0au\u3000lait"])
def test_unicode_form_and_white_space_do_not_change_the_digest(text: str) -> None:
    digest, input_digest = row_digests([text], ["yes"])
    assert digest == row_digest("Caf\u00e9 au lait", "yes")
    assert input_digest == row_digest("Caf\u00e9 au lait") == stored_input_digest("labelled", text)


@pytest.mark.parametrize(
    ("columns", "fields", "names"),
    [
        (("id", " Body ", "CATEGORY"), {"format": "auto"}, {"text": " Body ", "label": "CATEGORY"}),
        (("sentence", "intent", "Split"), {}, {"text": "sentence", "label": "intent", "split": "Split"}),
        (("instruction", "response"), {"format": "auto"}, {"prompt": "instruction", "completion": "response"}),
        (("question", "answer"), {"format": "auto"}, {"prompt": "question", "completion": "answer"}),
        (("messages",), {"format": "auto"}, {"messages": "messages"}),
        (("sentence", "text", "label"), {"format": "auto"}, {"text": "text", "label": "label"}),
        (("text", "label", "question", "input"), {"format": "auto"}, {"text": "text", "label": "label"}),
        (("text", "label", "q", "z"), {"columns": {"text": "q", "label": "z"}}, {"text": "q", "label": "z"}),
        (("Text", "text", "label"), {}, {"text": "text", "label": "label"}),
        (("messages", "text", "label"), {"format": "auto", "labels": ("a", "b")}, {"text": "text", "label": "label"}),
    ],
)
def test_columns_and_format_are_found_by_the_task_or_by_convention(
    columns: tuple[str, ...], fields: dict[str, Any], names: dict[str, str]
) -> None:
    assert resolve_columns(columns, task_of(**fields), "f.csv").names == names


@pytest.mark.parametrize(
    ("columns", "fields", "message"),
    [
        (("text", "y"), {}, "f.csv has the columns 'text', 'y', and labelled rows need text and label"),
        (("x", "y"), {"format": "auto"}, "completion rows need prompt and completion or chat rows need messages"),
        (("text", "label", "messages"), {"format": "auto"}, "more than one format (labelled, chat)"),
        (("text", "label"), {"columns": {"text": "body"}}, "no column 'body', which task.columns gives for text"),
        (("text", "label"), {"columns": {"label": "text"}}, "two meanings"),
        (("Text", "TEXT", "label"), {}, "2 columns that could be text"),
        (("question", "input", "output"), {"format": "auto"}, "could be prompt: 'question', 'input'"),
        (tuple(f"c{i}" for i in range(500)), {}, "(500 in all)"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_name(
    columns: tuple[str, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataValidationError) as error:
        resolve_columns(columns, task_of(**fields), "f.csv", include_texts=True)
    assert message in str(error.value)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize("named", [{}, {"text": "note"}, {"text": "report", "label": "Finding"}])
def test_without_texts_only_names_that_are_looked_for_are_quoted(named: dict[str, str]) -> None:
    """Without a header, a row's texts would be read as column names."""
    with pytest.raises(DataValidationError) as error:
        resolve_columns((" Finding ", "Topic", "I am Jane Doe", "4111"), task_of(columns=named), "f.jsonl")
    message = str(error.value)
    assert "Jane" not in message and "4111" not in message
    assert "4 columns" in message and "'Topic'" in message and ("Finding " in message) == ("label" in named)
    assert "first line" not in message, "of JSON lines it names no columns"
