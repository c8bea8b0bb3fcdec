"""Recognise the shape of a file, and refuse with a remedy a shape that would be learned wrongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deal_core.config import PREFERENCE
from deal_core.data.chats import as_messages
from deal_core.data.columns import CONVENTIONS, Columns, late_keys, resolve_columns
from deal_core.data.reading.parsing import FileHead
from deal_core.data.reading.readers import file_kind, read_head
from deal_core.data.row_checks import list_of_answers
from deal_core.data.schema import COLUMNS_OF_FORMAT, PREFERENCE_COLUMNS, TaskSchema
from deal_core.errors import DataValidationError
from deal_core.safe_text import listed

ANSWER_LISTS = ("answers", "references")
"""Names of a column that lists the right answers of each row, if no column is named like a single answer."""
_ONE_ANSWER = set(CONVENTIONS["completion"])
_ANSWERS = {*CONVENTIONS["completion"], *CONVENTIONS["messages"]}


def recognise(path: Path, task: TaskSchema, *, include_texts: bool = False) -> Columns:
    """Find a file's columns and its shape. The arguments are those of `resolve_columns`.

    Raises:
        DataValidationError: The file cannot be read, or has no shape that can be learned.
    """
    head, is_json = read_head(path), file_kind(path) == "jsonl"
    file_columns = head.columns
    if not file_columns and is_json:
        # No line is readable: with the format's own names, every line is reported.
        head = FileHead(COLUMNS_OF_FORMAT["labelled" if task.format == "auto" else task.format])
        task = replace(task, columns={})
    cells = list(head.examples.values())
    if cells and all(isinstance(cell, dict) and "0" in cell for cell in cells):
        raise DataValidationError(
            f"{path.name} was written by columns, and one object per row is needed. Write it with "
            'DataFrame.to_json(path, orient="records", lines=True).'
        )

    def recognised(columns: Columns) -> Columns:
        unread = late_keys(task, columns) - {*file_columns} if is_json else frozenset()
        return replace(columns, shape=_shape_of(columns, head) if file_columns else "", unread=unread)

    if preferences := _find_preferences(head, task, path.name, include_texts):
        return recognised(preferences)
    columns = _find_columns(head, task, path.name, include_texts)
    # Good and bad answers that a column label marks are meant for unpaired preference training.
    completion = None if "completion" in task.columns else columns.names.get("completion")
    if completion is not None and type(head.examples.get("label")) is bool:
        raise DataValidationError(
            f"{path.name} holds rated answers: {columns.names['prompt']}, {completion}, and a label that is true or "
            "false. Every answer would be learned, the bad ones too. Keep the rows whose label is true and leave the "
            f"label out, or set task.columns to {{completion: {completion}}} to learn them all."
        )
    names = head.class_names.get(columns.names.get("label", ""), ())
    return recognised(
        replace(columns, label_names={str(number): " ".join(name.split()) for number, name in enumerate(names)})
    )


def completed_task(task: TaskSchema, files: Sequence[tuple[str, Columns]]) -> TaskSchema:
    """The task with the fields that its files decide. `files` has the name and the columns of each file.

    Raises:
        DataValidationError: The files differ in format, or the task's metric does not fit them.
    """
    (source, first), *others = files
    for name, columns in others:
        if columns.format != first.format:
            raise DataValidationError(
                f"{source} and {name} have rows of different formats ({first.format} and {columns.format}); "
                "set task.format and name the columns alike."
            )
        if columns.has_preferences != first.has_preferences:
            raise DataValidationError(
                f"Of {source} and {name} only one has the columns chosen and rejected; give both files these "
                "columns, or none."
            )
    kind, learns_preferences = first.format, first.has_preferences
    of_kind = PREFERENCE if learns_preferences else "exact" if kind == "labelled" else "rouge_l"
    metric = of_kind if task.metric == "auto" else task.metric
    if metric == PREFERENCE and not learns_preferences:
        raise DataValidationError(
            f"task.metric is {PREFERENCE}, and {source} has no columns chosen and rejected; leave the metric out, or "
            "give each row a better and a worse answer."
        )
    return replace(
        task,
        format=kind,
        metric=metric,
        learns_preferences=learns_preferences,
        assistant_turns=task.assistant_turns if kind == "chat" and not learns_preferences else "last",
    )


def _find_preferences(head: FileHead, task: TaskSchema, source: str, include_texts: bool) -> Columns | None:
    """The columns of a file with a better and a worse answer in each row; None if it is none, or learned otherwise.

    Such a file is recognised for a new task if it has no other answers, and nobody has named its columns of answers. A
    file whose answers are whole chats needs no prompt.
    """
    named, have = set(task.columns), {name.strip().casefold(): name for name in head.columns}
    is_asked = task.learns_preferences or not named.isdisjoint(PREFERENCE_COLUMNS)
    is_labelled = all(not have.keys().isdisjoint(CONVENTIONS[name]) for name in ("text", "label"))
    has_others = not (named.isdisjoint(("completion", "messages")) and have.keys().isdisjoint(_ANSWERS))
    is_new_task = task.format == "auto" and not task.labels
    has_only_preferences = not has_others and not is_labelled
    if not is_asked and not (is_new_task and has_only_preferences):
        return None
    chosen, rejected = names = [task.columns.get(ours) or have.get(ours) or ours for ours in PREFERENCE_COLUMNS]
    if missing := [name for name in names if name not in head.columns]:
        if not is_asked:
            return None
        raise DataValidationError(
            f"{source} has no column {listed(missing)}, and task {task.name!r} learns preferences: each row needs a "
            "better and a worse answer, in the columns chosen and rejected. Answers alone belong to another task."
        )
    others = {name: column for name, column in task.columns.items() if name not in PREFERENCE_COLUMNS}
    if _is_whole_chat(head, chosen, task):
        chat = replace(task, format="chat", columns={**others, "messages": chosen})
        columns = resolve_columns(head.columns, chat, source, include_texts=include_texts)
    else:
        answers = replace(task, format="completion", columns={**others, "completion": chosen})
        try:
            columns = resolve_columns(head.columns, answers, source, include_texts=include_texts)
        except DataValidationError as error:
            raise DataValidationError(
                f"{error} A file of preferences has a prompt in each row, or whole chats under chosen and rejected."
            ) from None
        columns = _chat_in_two_columns(head, answers, source) or columns
    return replace(columns, names={**columns.names, "rejected": rejected})


def _is_whole_chat(head: FileHead, column: str, task: TaskSchema) -> bool:
    """Whether a column's example is a chat with the question in it, and not the assistant's answer alone.

    An example of Parquet has the first message alone. It is a chat's if no other column has the question as messages.
    """
    chosen = _example_messages(head, column)
    prompts = (
        [task.columns["prompt"]]
        if "prompt" in task.columns
        else [name for name in head.columns if name.strip().casefold() in CONVENTIONS["prompt"]]
    )
    return len(chosen) > 1 or (bool(chosen) and not any(_example_messages(head, name) for name in prompts))


def _find_columns(head: FileHead, task: TaskSchema, source: str, include_texts: bool) -> Columns:
    try:
        columns = resolve_columns(head.columns, task, source, include_texts=include_texts)
    except DataValidationError as error:
        if columns_with_answers := _lists_of_answers(head, task, source):
            return columns_with_answers
        if task.format == "chat" and (chat := _chat_in_two_columns(head, task, source)):
            return chat
        if remedy := _remedy(head, task):
            raise DataValidationError(f"{source} {remedy}") from None
        if task.format == "auto" and "label" not in task.columns and "no column is named like label" in str(error):
            raise DataValidationError(
                f"{error} Texts without a label or an answer (continued pre-training) cannot be learned."
            ) from None
        raise
    if task.format == "auto" and columns.format == "completion":
        return _chat_in_two_columns(head, task, source) or columns
    return columns


def _lists_of_answers(head: FileHead, task: TaskSchema, source: str) -> Columns | None:
    """The columns of a file whose answers are lists under one of ANSWER_LISTS; None if it has no such column."""
    names = {name.strip().casefold(): name for name in head.columns}
    if task.format not in ("auto", "completion") or "completion" in task.columns or names.keys() & _ONE_ANSWER:
        return None
    lists = [names[name] for name in ANSWER_LISTS if name in names]
    if len(lists) != 1 or list_of_answers(head.examples.get(lists[0])) is None:
        return None
    try:
        return resolve_columns(head.columns, replace(task, columns={**task.columns, "completion": lists[0]}), source)
    except DataValidationError:
        return None


def _chat_in_two_columns(head: FileHead, task: TaskSchema, source: str) -> Columns | None:
    """The columns of a chat whose prompt and completion are lists of messages; None if the file has no such cells."""
    if "messages" in task.columns:
        return None
    try:
        columns = resolve_columns(head.columns, replace(task, format="completion"), source)
    except DataValidationError:
        return None
    names = {name: column for name, column in columns.names.items() if name != "context"}
    if not all(_example_messages(head, names[name]) for name in ("prompt", "completion")):
        return None
    tools = task.columns.get("tools", "tools")
    return Columns(format="chat", names={**names, **({"tools": tools} if tools in head.columns else {})})


def _example_messages(head: FileHead, column: str) -> Sequence[Mapping[str, Any]]:
    """The messages of a column's example; empty if its cells are no messages, such as other lists written as JSON."""
    messages = as_messages(head.examples.get(column)) or ()
    return messages if any("role" in message or "from" in message for message in messages) else ()


def _remedy(head: FileHead, task: TaskSchema) -> str | None:
    """What to do about a file of a known shape that cannot be learned as it is."""
    have = {name.strip().casefold(): name for name in head.columns}
    if {"chosen", "rejected"} <= have.keys():
        chosen, take_chosen = have["chosen"], "write the rows with the columns prompt and completion"
        if any(name in have for name in ("prompt", "instruction", "question")):
            take_chosen = f"set task.columns to {{completion: {chosen}}}"
        elif _example_messages(head, chosen):
            take_chosen = f"set task.columns to {{messages: {chosen}}}"
        return (
            "holds preference rows (chosen and rejected). A new task without task.format learns the preferences. "
            f"To learn the chosen answers alone, {take_chosen}."
        )
    if list(have) == ["text"] and task.format == "auto":
        return (
            "holds texts without labels or answers (continued pre-training), which cannot be learned. Give each row an "
            "answer: a column label, or columns prompt and completion in place of text."
        )
    return None


def _shape_of(columns: Columns, head: FileHead) -> str:
    """The shape in a few words for people."""
    names = columns.names
    if columns.has_preferences:
        prompt = [names[name] for name in ("prompt", "context") if name in names]
        better = names["messages"] if "messages" in names else names["completion"]
        kind = "preferences of chats" if columns.format == "chat" else "preferences"
        return f"{kind} ({', '.join([*prompt, better])} over {names['rejected']})"
    if columns.format == "labelled":
        named = "; ClassLabel names the labels" if columns.label_names else ""
        return f"labelled rows ({names['text']}, {names['label']}{named})"
    if columns.format == "completion":
        if "context" not in names:
            return f"completions ({names['prompt']}, {names['completion']})"
        kind = "Alpaca rows" if names["context"].strip().casefold() == "input" else "completions"
        return f"{kind} ({names['prompt']} with {names['context']} under it, {names['completion']})"
    tools = " with tools" if "tools" in names else ""
    if "messages" not in names:
        return f"chats in two columns{tools} ({names['prompt']}, {names['completion']})"
    is_sharegpt = any("from" in message for message in _example_messages(head, names["messages"])[:1])
    return f"{'ShareGPT chats' if is_sharegpt else 'chats'}{tools} ({names['messages']})"
