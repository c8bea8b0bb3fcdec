"""Files of feedback on logged answers: the columns of a task's files, and the file that `deal feedback add` takes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deal_core.data.reading.readers import read_rows
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError, DataValidationError
from deal_core.monitoring.feedback import JUDGEMENTS, Feedback, is_empty, read_entry
from infra.log_batches import put_rows
from infra.predictions import feedback_log, read_predictions
from infra.store.base import ObjectStore
from infra.store.keys import inbox_folder
from tasks.context import current_store
from tasks.inbox import task_spec
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.requests import added_labels

MAX_TOLD = 3
"""Most wrong rows that a message lists."""


def as_landed(store: ObjectStore, schema: TaskSchema) -> TaskSchema:
    """Return the task with the names of columns that its next file must have: those of the task file, if it has any."""
    spec = task_spec(store, f"{inbox_folder(schema.name)}/feedback.jsonl")
    return replace(
        schema, columns=spec.columns or schema.columns, assistant_turns=spec.assistant_turns or schema.assistant_turns
    )


def answer_column(schema: TaskSchema) -> str:
    """Return the column that a person fills in: the task's own for a label or a completion, or feedback's `answer`."""
    # a chat's right answer is a part of its messages, and a preference has two answers
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
    return values | said_columns(schema)


def said_columns(schema: TaskSchema) -> dict[str, str]:
    """Return the further columns that the task's files are said to have, with their values in a training row."""
    wanted = {"context": "", "split": "train"}
    return {schema.columns[name]: value for name, value in wanted.items() if name in schema.columns}


def has_earlier_answers(schema: TaskSchema, text: str) -> bool:
    """Return whether a row of this chat would teach its earlier answers too, which no person has reviewed."""
    if schema.format != "chat" or schema.assistant_turns != "all":
        return False
    return "assistant" in [message["role"] for message in json.loads(text)]


class FeedbackResult(BaseModel, frozen=True):
    """What a file has brought."""

    lineage: str
    file: str
    num_taken: int
    """Rows whose feedback was taken."""
    num_blank: int
    """Rows without feedback, such as those that were not filled in."""
    num_unknown: int
    """Rows about answers that the log does not have. They were taken, but only answers in the log can be learned."""


def take_feedback_file(path: Path, lineage: str) -> FeedbackResult:
    """Store the feedback of a file: CSV, JSON lines or Parquet, with `id` and the other keys of an entry as columns.

    A file without a column `label`, `answer` or `is_right` is read by the task's own name of its answers' column. Other
    columns are not read. The same file may be taken again. All rows are taken, or none.

    Raises:
        RegistryError: The lineage has no champion.
        DataValidationError: The file cannot be read, or a row is wrong. The message lists the first wrong rows.
    """
    store, now = current_store(), time.time()
    tasks = task_schemas(store, lineage)
    own = {name: (answer_column(as_landed(store, schema)), schema) for name, schema in tasks.items()}
    logged = read_predictions(store, lineage, columns=["id", "input"])
    task_of: dict[str, str] = dict(zip(logged["id"], logged["task"], strict=True))
    has_text = dict(zip(logged["id"], logged["input"].notna(), strict=True))
    keeps_texts = any([*has_text.values()][-1:])  # what the log keeps now, for an answer that it does not have
    entries: list[Feedback] = []
    problems: list[str] = []
    num_blank = 0
    for row in read_rows(path):
        place, task = f"Row {row.number}", task_of.get(str(row.values.get("id")).strip()[-32:], "")
        values = _in_names_of_feedback(row.values, [own[task]] if task in own else own.values())
        if row.fault is not None:
            problems.append(f"{place} cannot be read.")
        elif all(is_empty(values.get(name)) for name in JUDGEMENTS):
            num_blank += 1
        else:
            try:
                entry = read_entry(values, place, source="command", now=now)
                entry.check_texts(has_text.get(entry.feedback.id, keeps_texts), place)
                entries.append(entry.check_against(tasks, task_of.get(entry.feedback.id), place))
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        more = f" {len(problems) - MAX_TOLD} more rows are wrong." if len(problems) > MAX_TOLD else ""
        raise DataValidationError(f"{path.name} was not taken. {' '.join(problems[:MAX_TOLD])}{more}")
    if not entries:
        raise DataValidationError(f"{path.name} has no feedback; fill in the column {', '.join(JUDGEMENTS)} of a row.")
    put_rows(store, feedback_log(lineage), [{"entry": uuid.uuid4().hex, **vars(entry)} for entry in entries])
    num_unknown = sum(entry.id not in task_of for entry in entries)
    return FeedbackResult(
        lineage=lineage, file=str(path), num_taken=len(entries), num_blank=num_blank, num_unknown=num_unknown
    )


def _in_names_of_feedback(values: Mapping[str, Any], own: Iterable[tuple[str, TaskSchema]]) -> Mapping[str, Any]:
    """Return a row with `label` or `answer` in place of the own name of that column in one of the tasks `own`."""
    for column, schema in own:
        if not is_empty(values.get(column)) and not any(name in values for name in JUDGEMENTS if name != column):
            others = {name: value for name, value in values.items() if name != column}
            return {**others, "label" if schema.labels else "answer": values[column]}
    return values


def task_schemas(store: ObjectStore, lineage: str) -> dict[str, TaskSchema]:
    """Return the tasks of a lineage's champion by name, with the labels that were added by command."""
    record = read_record(store, find_version(store, lineage, None))
    schemas = [task.schema for task in record.tasks]
    return {
        schema.name: schema.with_labels(added_labels(store, lineage, schema.name)) if schema.labels else schema
        for schema in schemas
    }
