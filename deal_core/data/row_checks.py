"""Check the rows of a file: each row becomes a good row or a list of all its problems.

Most rows are good, so cells are checked column by column: a column becomes a list of texts, and the few problems stand
beside it by their places. Chats are checked row by row, because a message is judged by the messages before it.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from deal_core.data import chats
from deal_core.data.arrow_rows import good_rows
from deal_core.data.columns import Columns
from deal_core.data.reading.batches import NO_CELL, RowBatch
from deal_core.data.rows import Problem, Reason, Row, message_parts, normal_line_ends, preference_digest, row_digests
from deal_core.data.schema import Format, TaskSchema, label_key, seen_key
from deal_core.safe_text import shorten

_SPLITS = {
    "split": {"train": "train", "test": "test"},
    "is_random": {"false": "train", "true": "test"},
}
"""Column → what a cell may say → split."""
_ASKING = ("user", "tool")
"""Roles whose message the assistant answers next."""
_WHOLE_NUMBER = re.compile(r"[+-]?\d+(\.0+)?")
_NAME_IT = 'a whole number; name it in the spec, labels: {"0": NAME, "1": NAME}'

Problems = dict[int, list[Problem]]
"""All problems of each bad row, by the row's place in its batch."""


class Checked(NamedTuple):
    """What the checks found in a batch."""

    good: pa.RecordBatch
    """See GOOD_ROWS; in order of place."""
    bad: Problems


def normal_input(kind: Format, text: str) -> str:
    """An input in the form in which datasets store it. The model learned this form, so questions must use it too."""
    if kind == "chat":
        return json.dumps(chats.normal_chat(json.loads(text)), ensure_ascii=False)
    text = normal_line_ends(text)
    return text.strip() if kind == "labelled" else text


class RowChecker:
    """Checks the rows of one file by its task and its columns."""

    def __init__(self, task: TaskSchema, columns: Columns, max_text_chars: int) -> None:
        self._columns = columns
        self._max_text_chars = max_text_chars
        self._label_of_key = {label_key(label): label for label in task.labels}
        self._label_names = {**columns.label_names, **task.label_names}
        self._name_of_key = _names_by_key(self._label_names)
        self._learns_every_turn = task.format == "chat" and task.assistant_turns == "all"

    def check(self, batch: RowBatch) -> Checked:
        """The good rows, and all problems of the bad ones. If the task has no labels yet, every label is good."""
        problems: Problems = defaultdict(list)
        splits = self._splits(batch, problems)
        match self._columns.format:
            case "labelled":
                rows = self._labelled(batch, problems)
            case "completion":
                rows = self._completions(batch, problems)
            case "chat":
                rows = _rows_of({place: self._chat(raw.values) for place, raw in enumerate(batch.rows())}, problems)
        problems = _all_of(problems, batch)
        rows = {place: row for place, row in rows.items() if place not in problems}
        is_test = [splits[place] == "test" for place in rows]
        return Checked(good_rows([*rows.values()], [*rows], is_test), problems)

    def check_inputs(self, batch: RowBatch) -> list[str | list[Problem]]:
        """The input of each row in stored form, or all its problems.

        A chat may end with the user's turn or the assistant's.
        """
        problems: Problems = defaultdict(list)
        inputs: list[str | list[Problem]]
        match self._columns.format:
            case "labelled":
                inputs = [text.strip() for text in self._texts("text", batch, problems)]
            case "completion":
                inputs = [*self._prompts(batch, problems)]
            case "chat":
                inputs = [self._conversation(raw.values) for raw in batch.rows()]
        problems = _all_of(problems, batch)
        return [problems.get(place, text) for place, text in enumerate(inputs)]

    # --- the rows of each format, by their places

    def _labelled(self, batch: RowBatch, problems: Problems) -> dict[int, Row]:
        texts = [text.strip() for text in self._texts("text", batch, problems)]
        labels = self._labels(batch, problems)
        keys = {label: label_key(label) for label in {*labels}}
        return {
            place: Row(text, label, *row_digests([text], [keys[label]]))
            for place, (text, label) in enumerate(zip(texts, labels, strict=True))
            if place not in problems  # the digest of a very long text would take long
        }

    def _completions(self, batch: RowBatch, problems: Problems) -> dict[int, Row]:
        prompts = self._prompts(batch, problems)
        answers = self._answers(batch, problems)
        rejected = self._texts("rejected", batch, problems) if self._columns.has_preferences else None
        rows = {
            place: Row(prompt, right[0], *row_digests([prompt], right), right if len(right) > 1 else ())
            for place, (prompt, right) in enumerate(zip(prompts, answers, strict=True))
            if place not in problems
        }
        if rejected is None:
            return rows
        return _rows_of({place: _preference(row, rejected[place]) for place, row in rows.items()}, problems)

    # --- columns: the text of each row, which is empty where the row is bad

    def _texts(self, name: str, batch: RowBatch, problems: Problems) -> list[str]:
        column = self._columns.names[name]
        return _texts_of((self._text(cell, column) for cell in batch.cells(column)), problems)

    def _prompts(self, batch: RowBatch, problems: Problems) -> list[str]:
        """The prompts, with the rows' contexts, if any, on the lines under them."""
        prompts = self._texts("prompt", batch, problems)
        column = self._columns.names.get("context")
        if column is None:
            return prompts
        both = f"{self._columns.names['prompt']} with {column}"

        def joined(place: int, cell: object) -> str | Problem:
            context = "" if cell is NO_CELL else _as_text(cell, column)
            if isinstance(context, Problem):
                return context
            if place in problems or not context.strip():
                return prompts[place]
            return self._of_right_length(f"{prompts[place]}\n{context}", both)

        return _texts_of((joined(place, cell) for place, cell in enumerate(batch.cells(column))), problems)

    def _answers(self, batch: RowBatch, problems: Problems) -> list[tuple[str, ...]]:
        """The right answers of each row, each once; the first one is learned."""
        column = self._columns.names["completion"]
        answers = []
        for place, cell in enumerate(batch.cells(column)):
            listed = list_of_answers(cell)
            checked = [self._text(answer, column) for answer in ([cell] if listed is None else listed)]
            if not checked:
                checked = [_without_text("empty text", f"{column} has no answer")]
            if bad := [answer for answer in checked if isinstance(answer, Problem)]:
                problems[place] += bad
            answers.append(tuple(dict.fromkeys(answer for answer in checked if isinstance(answer, str))))
        return answers

    def _labels(self, batch: RowBatch, problems: Problems) -> list[str]:
        """The labels in the task's spelling."""
        column = self._columns.names["label"]
        cells = [_as_text(cell, column) for cell in batch.cells(column)]
        labels = {cell: cell if isinstance(cell, Problem) else self._label(cell) for cell in {*cells}}
        return _texts_of((labels[cell] for cell in cells), problems)

    def _splits(self, batch: RowBatch, problems: Problems) -> list[str]:
        """The splits that the file names; all empty if it names none."""
        name = self._columns.splitting
        if name is None:
            return [""] * len(batch)
        column = self._columns.names[name]
        return _texts_of((_split(_as_text(cell, column), _SPLITS[name]) for cell in batch.cells(column)), problems)

    # --- cells

    def _text(self, cell: object, column: str) -> str | Problem:
        """A cell's text with Unix line ends."""
        text = _as_text(cell, column)
        return text if isinstance(text, Problem) else self._of_right_length(text, column)

    def _of_right_length(self, text: str, column: str) -> str | Problem:
        if not text.strip():
            return _without_text("empty text", f"{column} is empty")
        if len(text) > self._max_text_chars:
            length = f"{len(text)} characters"
            why = f"{column} has {length}, allowed are {self._max_text_chars}"
            return Problem("over-long text", f"{length}: {shorten(text)}", why)
        return normal_line_ends(text)

    def _label(self, text: str) -> str | Problem:
        """The label that a cell names."""
        column = self._columns.names["label"]
        cell = " ".join(text.split())
        if is_whole_number(cell) and self._name_of(cell) is None and label_key(cell) not in self._label_of_key:
            cell = cell.partition(".")[0]  # whole numbers are floats in a CSV column with gaps
        name = self._name_of(cell)
        label = cell if name is None else name
        if self._label_of_key and label_key(label) not in self._label_of_key:
            label = cell  # the task was learned with the cells as its labels
        if not label:
            return _without_text("empty label", f"{column} is empty")
        if not self._label_of_key:
            if self._label_names and name is None:
                return Problem("label outside the task's set", shorten(cell), "the file has no name for it")
            return self._of_right_length(label, column)
        if (key := label_key(label)) in self._label_of_key:
            return self._label_of_key[key]
        shown, why = shorten(label), _NAME_IT if is_whole_number(label) else ""
        if seen_key(label) in map(seen_key, self._label_of_key.values()):
            why = "it differs from a label of the task by invisible characters"
            shown = f"{shown}: {why}"
        return Problem("label outside the task's set", shown, why)

    def _name_of(self, cell: str) -> str | None:
        """The label that a mapping gives for a cell; None if it gives none."""
        return self._label_names.get(cell, self._name_of_key.get(label_key(cell)))

    # --- chats

    def _chat(self, values: Mapping[str, Any]) -> Row | list[Problem]:
        names = self._columns.names
        wanted = [names[name] for name in ("messages", "prompt", "completion") if name in names]
        row = self._chat_in(wanted, values)
        if isinstance(row, list) or not self._columns.has_preferences:
            return row
        worse = self._chat_in([*wanted[:-1], names["rejected"]], values)
        if isinstance(worse, list):
            return worse
        if worse.input != row.input:
            why = f"{wanted[-1]} and {names['rejected']} differ before their last message"
            return [_without_text("malformed messages", why)]
        return _preference(row, worse.output)

    def _chat_in(self, wanted: Sequence[str], values: Mapping[str, Any]) -> Row | list[Problem]:
        """The row of a chat that these columns hold together."""
        if missing := [column for column in wanted if column not in values]:
            return [Problem("missing column", column, column) for column in missing]
        cell = values[wanted[0]] if len(wanted) == 1 else _joined([values[column] for column in wanted])
        cell, answers = chats.split_answers(cell)
        names = self._columns.names
        messages = chats.parse_messages(
            cell, values.get(names["tools"]) if "tools" in names else None, learns_every_turn=self._learns_every_turn
        )
        if isinstance(messages, Problem):
            return [messages]
        column = " and ".join(wanted)
        if chats.is_any_empty(messages):
            whole: str | Problem = _without_text("empty text", f"a message in {column} is empty")
        else:
            whole = self._of_right_length(
                "".join(part for message in messages for part in message_parts(message)[1:]), column
            )
        others = [self._text(answer, f"a right answer in {column}") for answer in answers[1:]]
        if problems := [text for text in (whole, *others) if isinstance(text, Problem)]:
            return problems
        return chats.chat_row(messages, [answer for answer in others if isinstance(answer, str)])

    def _conversation(self, values: Mapping[str, Any]) -> str | list[Problem]:
        """The messages before the wanted answer."""
        column = self._columns.names.get("messages")  # None: a chat in two columns has its answer
        messages = None if column is None else chats.as_messages(values.get(column))
        if column is not None and messages is not None:
            if chats.role_of(messages[-1]) in _ASKING:
                messages = [*messages, {"role": "assistant", "content": "-"}]  # the checks expect an answer at the end
            values = {**values, column: messages}
        row = self._chat(values)
        return row.input if isinstance(row, Row) else row


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


def _without_text(reason: Reason, why: str) -> Problem:
    """A problem whose value is no text of the row."""
    return Problem(reason, why, why)


def _all_of(problems: Problems, batch: RowBatch) -> Problems:
    """All problems in order of place. Of a row that could not be read, only that counts: it has no cells."""
    return dict(sorted({**problems, **{place: [fault] for place, fault in batch.faults.items()}}.items()))


def _texts_of(cells: Iterable[str | Problem], problems: Problems) -> list[str]:
    """The texts of a column. Its problems are added to those of the columns before."""
    texts = []
    for place, text in enumerate(cells):
        if isinstance(text, Problem):
            problems[place].append(text)
            text = ""
        texts.append(text)
    return texts


def _rows_of(checked: Mapping[int, Row | list[Problem]], problems: Problems) -> dict[int, Row]:
    """The rows; the problems of the others are added to those of the columns before."""
    rows = {}
    for place, row in checked.items():
        if isinstance(row, Row):
            rows[place] = row
        else:
            problems[place] += row
    return rows


def _preference(row: Row, rejected: str) -> Row | list[Problem]:
    """The row as a preference of its answer over another one."""
    if " ".join(row.output.split()) == " ".join(rejected.split()):
        return [_without_text("equal answers", "both answers are the same")]
    return row._replace(digest=preference_digest(row.digest, rejected), references=(), rejected=rejected)


def _names_by_key(names: Mapping[str, str]) -> dict[str, str]:
    """The labels by the keys of their cells. Cells of one key that name different labels count as they are spelled."""
    of_key: dict[str, dict[str, str]] = {}
    for cell, name in names.items():
        of_key.setdefault(label_key(cell), {})[label_key(name)] = name
    return {key: name for key, labels in of_key.items() if len(labels) == 1 for name in labels.values()}


def _joined(cells: Sequence[object]) -> object:
    """One list of several lists; the first cell that is not a list, if there is one."""
    lists = [chats.as_messages(cell) for cell in cells]
    joined = [message for messages in lists if messages is not None for message in messages]
    return joined if None not in lists else cells[lists.index(None)]


def _split(text: str | Problem, splits: Mapping[str, str]) -> str | Problem:
    """The split that a cell's text names."""
    if isinstance(text, Problem):
        return text
    if (split := splits.get(text.strip().casefold())) is None:
        why = f"neither {' nor '.join(splits)}"
        return Problem("unknown split", f"{shorten(text)!r} is {why}", why)
    return split


def _as_text(cell: object, column: str) -> str | Problem:
    """A cell as text, unless it is not a single value, or not UTF-8. Bytes that are not are lone surrogates."""
    if isinstance(cell, str):
        text = cell
    elif cell is NO_CELL:
        return Problem("missing column", column, column)
    elif cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    elif isinstance(cell, (list, dict, tuple)):
        return _without_text("malformed line", f"{column} is a {type(cell).__name__}, not a text")
    elif isinstance(cell, bytes):
        text = cell.decode("utf-8", "surrogateescape")
    elif isinstance(cell, float) and cell.is_integer():
        text = str(int(cell))  # whole numbers are floats in a column with gaps
    else:
        text = str(cell)
    if bad := chats.UNDECODABLE.search(text):
        shown = shorten(text[max(0, bad.start() - 20) :])
        return Problem("bad encoding", shown, f"{column} has {chats.NOT_UTF8}")
    return text
