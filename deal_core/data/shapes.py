"""Recognise the shape of a file, and refuse with a remedy a shape that would be learned wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deal_core.data.chats import as_messages
from deal_core.data.check import list_of_answers
from deal_core.data.columns import CONVENTIONS, Columns, resolve_columns
from deal_core.data.reading.look import FileLook
from deal_core.data.reading.readers import file_kind, look_at
from deal_core.data.schema import COLUMNS_OF_FORMAT, TaskSchema
from deal_core.errors import DataValidationError

ANSWER_LISTS = ("answers", "references")
"""Names of a column that lists the right answers of each row, if no column is named like a single answer."""
_ONE_ANSWER = set(CONVENTIONS["completion"])


def recognise(path: Path, task: TaskSchema, *, include_texts: bool = False) -> Columns:
    """Find a file's columns and its shape. The arguments are those of `resolve_columns`.

    Raises:
        DataValidationError: The file cannot be read, or has no shape that can be learned.

    Example:
        >>> recognise(Path("alpaca.json"), TaskSchema(name="t", format="auto")).shape  # doctest: +SKIP
        'Alpaca rows (instruction with input under it, output)'
    """
    look = known = look_at(path)
    if not look.columns and file_kind(path) == "jsonl":
        # No line is readable: with the format's own names, every line is reported.
        look = FileLook(COLUMNS_OF_FORMAT["labelled" if task.format == "auto" else task.format])
        task = replace(task, columns={})
    cells = list(look.examples.values())
    if cells and all(isinstance(cell, dict) and "0" in cell for cell in cells):
        raise DataValidationError(
            f"{path.name} was written by columns, and one object per row is needed. Write it with "
            'DataFrame.to_json(path, orient="records", lines=True).'
        )
    columns = _find_columns(look, task, path.name, include_texts)
    if _are_rated(columns, look, task):
        raise DataValidationError(
            f"{path.name} holds rated answers: {columns.names['prompt']}, {columns.names['completion']}, and a label "
            "that is true or false. Every answer would be learned, the bad ones too. Keep the rows whose label is true "
            "and leave the label out, or set task.columns to {completion: "
            f"{columns.names['completion']}}} to learn them all."
        )
    names = look.class_names.get(columns.names.get("label", ""), ())
    columns = replace(columns, label_names={str(number): " ".join(name.split()) for number, name in enumerate(names)})
    return replace(columns, shape=_shape_of(columns, look) if known.columns else "")


def _find_columns(look: FileLook, task: TaskSchema, source: str, include_texts: bool) -> Columns:
    try:
        columns = resolve_columns(look.columns, task, source, include_texts=include_texts)
    except DataValidationError as error:
        if columns_with_answers := _lists_of_answers(look, task, source):
            return columns_with_answers
        if task.format == "chat" and (chat := _chat_in_two_columns(look, task, source)):
            return chat
        if remedy := _remedy(look, task):
            raise DataValidationError(f"{source} {remedy}") from None
        if task.format == "auto" and "label" not in task.columns and "no column is named like label" in str(error):
            raise DataValidationError(
                f"{error} Texts without a label or an answer (continued pre-training) cannot be learned."
            ) from None
        raise
    if task.format == "auto" and columns.format == "completion":
        return _chat_in_two_columns(look, task, source) or columns
    return columns


def _lists_of_answers(look: FileLook, task: TaskSchema, source: str) -> Columns | None:
    """The columns of a file whose answers are lists under one of ANSWER_LISTS; None if it has no such column."""
    names = {name.strip().casefold(): name for name in look.columns}
    if task.format not in ("auto", "completion") or "completion" in task.columns or names.keys() & _ONE_ANSWER:
        return None
    found = [names[name] for name in ANSWER_LISTS if name in names]
    if len(found) != 1 or list_of_answers(look.examples.get(found[0])) is None:
        return None
    try:
        return resolve_columns(look.columns, replace(task, columns={**task.columns, "completion": found[0]}), source)
    except DataValidationError:
        return None


def _chat_in_two_columns(look: FileLook, task: TaskSchema, source: str) -> Columns | None:
    """The columns of a chat whose prompt and completion are lists of messages; None if the file has no such cells."""
    if "messages" in task.columns:
        return None
    try:
        columns = resolve_columns(look.columns, replace(task, format="completion"), source)
    except DataValidationError:
        return None
    names = {name: column for name, column in columns.names.items() if name != "context"}
    if not all(_example_message(look, names[name]) for name in ("prompt", "completion")):
        return None
    tools = task.columns.get("tools", "tools")
    return Columns(format="chat", names={**names, **({"tools": tools} if tools in look.columns else {})})


def _example_message(look: FileLook, column: str) -> Mapping[str, Any]:
    """The first message of a column's example; empty if the column's cells are no messages."""
    messages = as_messages(look.examples.get(column))
    return messages[0] if messages else {}


def _are_rated(columns: Columns, look: FileLook, task: TaskSchema) -> bool:
    """Whether the file has good and bad answers, marked by a column label, as for unpaired preference training."""
    named = "completion" in columns.names and "completion" not in task.columns
    return named and type(look.examples.get("label")) is bool


def _remedy(look: FileLook, task: TaskSchema) -> str | None:
    """What to do about a file of a known shape that cannot be learned as it is."""
    have = {name.strip().casefold(): name for name in look.columns}
    if {"chosen", "rejected"} <= have.keys():
        return (
            "holds preference rows (chosen and rejected), and only answers to learn are taken. "
            f"To learn the chosen answers, {_take_chosen(look, have)}."
        )
    if list(have) == ["text"] and task.format == "auto":
        return (
            "holds texts without labels or answers (continued pre-training), which cannot be learned. Give each row an "
            "answer: a column label, or columns prompt and completion in place of text."
        )
    return None


def _take_chosen(look: FileLook, have: Mapping[str, str]) -> str:
    chosen = have["chosen"]
    if any(name in have for name in ("prompt", "instruction", "question")):
        return f"set task.columns to {{completion: {chosen}}}"
    if _example_message(look, chosen):
        return f"set task.columns to {{messages: {chosen}}}"
    return "write the rows with the columns prompt and completion"


def _shape_of(columns: Columns, look: FileLook) -> str:
    """The shape in a few words for people."""
    names = columns.names
    if columns.format == "labelled":
        named = "; ClassLabel names the labels" if columns.label_names else ""
        return f"labelled rows ({names['text']}, {names['label']}{named})"
    if columns.format == "completion":
        if "context" not in names:
            return f"completions ({names['prompt']}, {names['completion']})"
        told = "Alpaca rows" if names["context"].strip().casefold() == "input" else "completions"
        return f"{told} ({names['prompt']} with {names['context']} under it, {names['completion']})"
    told = " with tools" if "tools" in names else ""
    if "messages" not in names:
        return f"chats in two columns{told} ({names['prompt']}, {names['completion']})"
    is_sharegpt = "from" in _example_message(look, names["messages"])
    return f"{'ShareGPT chats' if is_sharegpt else 'chats'}{told} ({names['messages']})"
