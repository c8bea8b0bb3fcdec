"""The columns of a task's files: their names, and the column of the right answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from deal_core.data.schema import TaskSchema
from infra.store.base import ObjectStore
from infra.store.keys import inbox_folder
from tasks.inbox import task_spec


def as_landed(store: ObjectStore, schema: TaskSchema) -> TaskSchema:
    """Return the task with the names of columns that its next file must have: those of the task file, if it gives any.

    Raises:
        TaskFieldsError: The task file is damaged or has a setting that is not valid.
    """
    spec = task_spec(store, f"{inbox_folder(schema.name)}/feedback.jsonl")
    return replace(
        schema, columns=spec.columns or schema.columns, assistant_turns=spec.assistant_turns or schema.assistant_turns
    )


def answer_column(schema: TaskSchema) -> str:
    """Return the column that a person fills in: the task's own for a label or a completion.

    A chat's right answer is a part of its messages, and a preference has two answers, so their column is the one of
    feedback, `answer`.
    """
    if schema.format == "chat" or schema.learns_preferences:
        return "answer"
    name = "completion" if schema.format == "completion" else "label"
    return schema.columns.get(name, name)


def input_columns(schema: TaskSchema, text: str) -> dict[str, Any]:
    """Return the columns of an input in stored form, by their names in the task's files."""
    values: dict[str, Any]
    if schema.format == "chat":
        messages = json.loads(text)
        offered = {"tools": messages[0].pop("tools")} if "tools" in messages[0] else {}
        values = {"messages": messages, **offered}
    else:
        values = {"prompt" if schema.format == "completion" else "text": text}
    return {schema.columns.get(name, name): value for name, value in values.items()}


def row_columns(schema: TaskSchema, text: str, right: str, given: str) -> dict[str, Any]:
    """Return the columns of an input and its right answer, by their names in the task's files.

    A task that learns preferences learns the right answer over the answer that was given.
    """
    values = input_columns(schema, text)
    if schema.learns_preferences:
        messages = values.pop(schema.columns.get("messages", "messages"), None)
        for name, answer in (("chosen", right), ("rejected", given)):
            chat = messages and [*messages, {"role": "assistant", "content": answer}]
            values[schema.columns.get(name, name)] = chat or answer
    elif schema.format == "chat":
        values[schema.columns.get("messages", "messages")].append({"role": "assistant", "content": right})
    else:
        values[answer_column(schema)] = right
    wanted = {"context": "", "split": "train"}  # columns that the task's files are said to have
    return values | {schema.columns[name]: value for name, value in wanted.items() if name in schema.columns}


def has_earlier_answers(schema: TaskSchema, text: str) -> bool:
    """Return whether a row of this chat would teach its earlier answers too, which no person has reviewed."""
    if schema.format != "chat" or schema.assistant_turns != "all":
        return False
    return "assistant" in [message["role"] for message in json.loads(text)]
