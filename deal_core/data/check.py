"""Check rows one by one: each row becomes a good row or a list of all its problems."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from deal_core.data import chats
from deal_core.data.columns import Columns
from deal_core.data.rows import (
    Problem,
    RawRow,
    Reason,
    Row,
    message_parts,
    normal_line_ends,
    preference_digest,
    row_digests,
)
from deal_core.data.schema import Format, Split, TaskSchema, label_key, seen_key
from deal_core.safe_text import shorten

_SPLITS: dict[str, dict[str, Split]] = {
    "split": {"train": "train", "test": "test"},
    "is_random": {"false": "train", "true": "test"},
}
"""Column → what a cell may say → split."""
_ASKING = ("user", "tool")
"""Roles whose message the assistant answers next."""
_WHOLE_NUMBER = re.compile(r"[+-]?\d+(\.0+)?")
_NAME_IT = 'a whole number; name it in the spec, labels: {"0": NAME, "1": NAME}'
_NO_ROW = Row("", "", b"", b"", None)


def normal_input(kind: Format, text: str) -> str:
    """An input in the form in which datasets store it. The model learned this form, so questions must use it too."""
    if kind == "chat":
        return json.dumps(chats.normal_chat(json.loads(text)), ensure_ascii=False)
    text = normal_line_ends(text)
    return text.strip() if kind == "labelled" else text


class RowChecker:
    """Turns the raw rows of one file into good rows or lists of problems."""

    def __init__(self, task: TaskSchema, columns: Columns, max_text_chars: int) -> None:
        self._columns = columns
        self._max_text_chars = max_text_chars
        self._label_of_key = {label_key(label): label for label in task.labels}
        self._label_names = {**columns.label_names, **task.label_names}
        self._name_of_key = _names_by_key(self._label_names)
        self._label_of = lru_cache(self._find_label)
        self._learns_every_turn = task.format == "chat" and task.assistant_turns == "all"

    def check(self, raw: RawRow) -> Row | list[Problem]:
        """The good row, or all its problems. If the task has no labels yet, every label is good."""
        if raw.fault is not None:
            return [raw.fault]
        problems: list[Problem] = []
        split = self.split(raw.values, problems)
        if self._columns.format == "chat":
            row = self._chat(raw.values, split, problems)
        elif self._columns.format == "completion":
            prompt = self._prompt(raw.values, problems)
            answers = self._answers(raw.values, problems)
            rejected = self._text(raw.values, "rejected", problems) if self._columns.has_preferences else None
            if problems:  # computing the digest of a very long text would take long
                return problems
            references = tuple(answers) if len(answers) > 1 else ()
            row = Row(prompt, answers[0], *row_digests([prompt], answers), split, references)
            if rejected is not None:
                row = self._preferred(row, rejected, problems)
        else:
            text = normal_input("labelled", self._text(raw.values, "text", problems))
            label = self.label(raw.values, problems)
            if problems:
                return problems
            row = Row(text, label, *row_digests([text], [label_key(label)]), split)
        return problems or row

    def check_input(self, raw: RawRow) -> str | list[Problem]:
        """The input in stored form, or all its problems. A chat may end with a turn of the user or the assistant."""
        if raw.fault is not None:
            return [raw.fault]
        problems: list[Problem] = []
        if self._columns.format == "chat":
            text = self._conversation(raw.values, problems)
        else:
            is_prompt = self._columns.format == "completion"
            text = self._prompt(raw.values, problems) if is_prompt else self._text(raw.values, "text", problems)
            text = normal_input(self._columns.format, text)
        return problems or text

    def _conversation(self, values: Mapping[str, Any], problems: list[Problem]) -> str:
        """The messages before the wanted answer."""
        if "messages" not in self._columns.names:  # a chat in two columns has its answer
            return self._chat(values, None, problems).input
        column = self._columns.names["messages"]
        messages = chats.as_messages(values.get(column))
        if messages is not None and chats.role_of(messages[-1]) in _ASKING:
            messages = [*messages, {"role": "assistant", "content": "-"}]  # the checks expect an answer at the end
        row = self._chat({**values, column: messages} if messages else values, None, problems)
        return row.input

    def _cell(self, values: Mapping[str, Any], name: str, problems: list[Problem]) -> str | None:
        """A column's text; None if a problem was found."""
        column = self._columns.names[name]
        if column in values:
            return _as_text(values[column], column, problems)
        problems.append(Problem("missing column", column, column))
        return None

    def _text(self, values: Mapping[str, Any], name: str, problems: list[Problem]) -> str:
        text = self._cell(values, name, problems)
        return "" if text is None else self._of_right_length(text, self._columns.names[name], problems)

    def _answers(self, values: Mapping[str, Any], problems: list[Problem]) -> list[str]:
        """The right answers of a row, each once; the first one is learned."""
        column = self._columns.names["completion"]
        listed = list_of_answers(values.get(column))
        if listed is None:
            return [self._text(values, "completion", problems)]
        if not listed:
            problems.append(_told("empty text", f"{column} has no answer"))
        return list(dict.fromkeys(self._answer(answer, column, problems) for answer in listed))

    def _answer(self, listed: str, column: str, problems: list[Problem]) -> str:
        text = _as_text(listed, column, problems)
        return "" if text is None else self._of_right_length(text, column, problems)

    def _prompt(self, values: Mapping[str, Any], problems: list[Problem]) -> str:
        """The prompt, with the row's context, if any, on the lines under it."""
        prompt = self._text(values, "prompt", problems)
        column = self._columns.names.get("context")
        context = self._cell(values, "context", problems) if column in values else None
        if problems or context is None or not context.strip():
            return prompt
        both = f"{self._columns.names['prompt']} with {column}"
        return self._of_right_length(f"{prompt}\n{context}", both, problems)

    def _of_right_length(self, text: str, column: str, problems: list[Problem]) -> str:
        """The text with Unix line ends; a text that is empty or too long is a problem."""
        if not text.strip():
            problems.append(_told("empty text", f"{column} is empty"))
        elif len(text) > self._max_text_chars:
            length = f"{len(text)} characters"
            why = f"{column} has {length}, allowed are {self._max_text_chars}"
            problems.append(Problem("over-long text", f"{length}: {shorten(text)}", why))
        return normal_line_ends(text)

    def label(self, values: Mapping[str, Any], problems: list[Problem]) -> str:
        """The label in the task's spelling."""
        text = self._cell(values, "label", problems)
        if text is None:
            return ""
        label, label_problems = self._label_of(text)
        problems += label_problems
        return label

    def _find_label(self, text: str) -> tuple[str, list[Problem]]:
        """The label that a cell names, and what is wrong with it."""
        problems: list[Problem] = []
        cell = " ".join(text.split())
        if is_whole_number(cell) and self._name_of(cell) is None and label_key(cell) not in self._label_of_key:
            cell = cell.partition(".")[0]  # whole numbers are floats in a CSV column with gaps
        name = self._name_of(cell)
        label = cell if name is None else name
        if self._label_of_key and label_key(label) not in self._label_of_key:
            label = cell  # the task was learned with the cells as its labels
        if not label:
            problems.append(_told("empty label", f"{self._columns.names['label']} is empty"))
        elif not self._label_of_key and self._label_names and name is None:
            problems.append(Problem("label outside the task's set", shorten(cell), "the file has no name for it"))
        elif not self._label_of_key:
            self._of_right_length(label, self._columns.names["label"], problems)
        elif label_key(label) not in self._label_of_key:
            why = _NAME_IT if is_whole_number(label) else ""
            shown = shorten(label)
            if seen_key(label) in map(seen_key, self._label_of_key.values()):
                why = "it differs from a label of the task by invisible characters"
                shown = f"{shown}: {why}"
            problems.append(Problem("label outside the task's set", shown, why))
        return self._label_of_key.get(label_key(label), label), problems

    def _name_of(self, cell: str) -> str | None:
        """The label that a mapping gives for a cell; None if it gives none."""
        return self._label_names.get(cell, self._name_of_key.get(label_key(cell)))

    def split(self, values: Mapping[str, Any], problems: list[Problem]) -> Split | None:
        """The split that the file names, or None."""
        name = self._columns.splitting
        if name is None:
            return None
        text = self._cell(values, name, problems)
        split = None if text is None else _SPLITS[name].get(text.strip().casefold())
        if text is not None and split is None:
            why = f"neither {' nor '.join(_SPLITS[name])}"
            problems.append(Problem("unknown split", f"{shorten(text)!r} is {why}", why))
        return split

    def _preferred(self, row: Row, rejected: str, problems: list[Problem]) -> Row:
        """The row as a preference of its answer over another one."""
        if " ".join(row.output.split()) == " ".join(rejected.split()):
            problems.append(_told("equal answers", "both answers are the same"))
        return row._replace(digest=preference_digest(row.digest, rejected), references=(), rejected=rejected)

    def _chat(self, values: Mapping[str, Any], split: Split | None, problems: list[Problem]) -> Row:
        names = self._columns.names
        wanted = [names[name] for name in ("messages", "prompt", "completion") if name in names]
        row = self._chat_in(wanted, values, problems)._replace(split=split)
        if problems or not self._columns.has_preferences:
            return row
        worse = self._chat_in([*wanted[:-1], names["rejected"]], values, problems)
        if not problems and worse.input != row.input:
            why = f"{wanted[-1]} and {names['rejected']} differ before their last message"
            problems.append(_told("malformed messages", why))
        return _NO_ROW if problems else self._preferred(row, worse.output, problems)

    def _chat_in(self, wanted: Sequence[str], values: Mapping[str, Any], problems: list[Problem]) -> Row:
        """The row of a chat that these columns hold together."""
        if missing := [column for column in wanted if column not in values]:
            problems += [Problem("missing column", column, column) for column in missing]
            return _NO_ROW
        cell = values[wanted[0]] if len(wanted) == 1 else _joined([values[column] for column in wanted])
        cell, answers = chats.split_answers(cell)
        names = self._columns.names
        messages = chats.parse_messages(
            cell, values.get(names["tools"]) if "tools" in names else None, learns_every_turn=self._learns_every_turn
        )
        if isinstance(messages, Problem):
            problems.append(messages)
            return _NO_ROW
        column = " and ".join(wanted)
        if chats.is_any_empty(messages):
            problems.append(_told("empty text", f"a message in {column} is empty"))
        else:
            texts = [part for message in messages for part in message_parts(message)[1:]]
            self._of_right_length("".join(texts), column, problems)
        others = [self._answer(answer, f"a right answer in {column}", problems) for answer in answers[1:]]
        return _NO_ROW if problems else chats.chat_row(messages, others)


def _names_by_key(names: Mapping[str, str]) -> dict[str, str]:
    """The labels by the keys of their cells. Cells of one key that name different labels count as they are spelled."""
    of_key: dict[str, dict[str, str]] = {}
    for cell, name in names.items():
        of_key.setdefault(label_key(cell), {})[label_key(name)] = name
    return {key: name for key, labels in of_key.items() if len(labels) == 1 for name in labels.values()}


def list_of_answers(cell: object) -> Sequence[str] | None:
    """The texts of a cell that lists right answers, plainly or as SQuAD does under text; None for any other cell."""
    answers = cell.get("text") if isinstance(cell, dict) else cell
    is_list = isinstance(answers, (list, tuple)) and all(type(answer) is str for answer in answers)
    return answers if is_list else None  # type: ignore[return-value]


def is_whole_number(label: str) -> bool:
    """Whether a label is a number, which says nothing about its meaning."""
    return _WHOLE_NUMBER.fullmatch(label) is not None


def numbers_for_labels(file: str) -> str:
    """Why a file whose labels are all numbers is refused."""
    return (
        f"{file} has whole numbers for labels, and the model would answer with numbers. Name them in "
        'task.labels: {"0": NAME, "1": NAME}. If the numbers are the right answers, list them there as texts: '
        'task.labels: ["0", "1"].'
    )


def too_many_labels(file: str, labels: Collection[str], most: int) -> str:
    """Why a file with so many labels is refused."""
    some = ", ".join(repr(shorten(label, 30)) for label in sorted(labels)[:5])
    return (
        f"{file} has more than {most} different labels{f', such as {some}' if some else ''}; list the right ones in "
        "task.labels, or set task.format to completion and task.columns to {prompt: …, completion: …} if the answers "
        "are free text."
    )


def _told(reason: Reason, why: str) -> Problem:
    """A problem whose value is no text of the row."""
    return Problem(reason, why, why)


def _joined(cells: Sequence[object]) -> object:
    """One list of several lists; the first cell that is not a list, if there is one."""
    lists = [chats.as_messages(cell) for cell in cells]
    joined = [message for messages in lists if messages is not None for message in messages]
    return joined if None not in lists else cells[lists.index(None)]


def _as_text(value: object, column: str, problems: list[Problem]) -> str | None:
    """A cell as text; None if it is not a single value, or not UTF-8. Bytes that are not are lone surrogates."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (list, dict, tuple)):
        problems.append(_told("malformed line", f"{column} is a {type(value).__name__}, not a text"))
        return None
    if isinstance(value, bytes):
        text = value.decode("utf-8", "surrogateescape")
    elif isinstance(value, float) and value.is_integer():
        text = str(int(value))  # whole numbers are floats in a column with gaps
    else:
        text = str(value)
    if bad := chats.UNDECODABLE.search(text):
        shown = shorten(text[max(0, bad.start() - 20) :])
        problems.append(Problem("bad encoding", shown, f"{column} has {chats.NOT_UTF8}"))
        return None
    return text
