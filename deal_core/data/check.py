"""Check rows: each row becomes a good row or a list of all its problems.

`BatchChecker` checks plain rows together by column, and all other rows one by one with `RowChecker`. A row is plain if
a fast test shows that it is good: a text of common characters in normal form with single spaces, and a label of the
task. The results are those of `RowChecker`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deal_core.data.chats import (
    NOT_UTF8,
    UNDECODABLE,
    as_messages,
    chat_row,
    is_any_empty,
    normal_chat,
    parse_messages,
    split_answers,
)
from deal_core.data.columns import Columns
from deal_core.data.rows import (
    Digests,
    Problem,
    RawRow,
    Reason,
    Row,
    RowBatch,
    as_digests,
    message_parts,
    normal_line_ends,
    quote_normal,
    row_digest,
)
from deal_core.data.schema import COLUMNS_OF_FORMAT, REFERENCES, Format, Split, TaskSchema, label_key
from deal_core.safe_text import shorten

_SPLITS: dict[str, dict[str, Split]] = {
    "split": {"train": "train", "test": "test"}, "is_random": {"false": "train", "true": "test"},
}  # fmt: skip
"""Column → what a cell may say → split."""
_ASKING = ("user", "human", "tool")
"""Roles whose message the assistant answers next."""
_WHOLE_NUMBER = re.compile(r"[+-]?\d+(\.0+)?")
_NAME_IT = 'a whole number; name it in the spec, labels: {"0": NAME, "1": NAME}'
_NO_ROW = Row("", "", b"", b"", None)
PLAIN = "!-~¡-ʯЀ-ҁҊ-ԯ‐-‧‰-⁞₠-₿ぁ-ゖァ-ヺ一-鿿가-힣！-～\U0001f300-\U0001faff"
"""Characters other than white space that Unicode's form NFC does not change, alone or next to each other."""
_PLAIN_TEXT = f"^[{PLAIN}]+(?: [{PLAIN}]+)*$"


def normal_input(kind: Format, text: str) -> str:
    """An input in the form in which datasets store it. The model learned this form, so questions must use it too."""
    if kind == "chat":
        return json.dumps(normal_chat(json.loads(text)), ensure_ascii=False)
    text = normal_line_ends(text)
    return text.strip() if kind == "labelled" else text


class RowChecker:
    """Turns the raw rows of one file into good rows or lists of problems."""

    def __init__(self, task: TaskSchema, columns: Columns, max_text_chars: int) -> None:
        self._columns = columns
        self._max_text_chars = max_text_chars
        self._label_of_key = {label_key(label): label for label in task.labels}
        self._label_names = {**columns.label_names, **task.label_names}

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
            if problems:  # computing the digest of a very long text would take long
                return problems
            row = Row(prompt, answers[0], row_digest(prompt, *answers), row_digest(prompt), split, _several(answers))
        else:
            text = normal_input("labelled", self._text(raw.values, "text", problems))
            label = self.label(raw.values, problems)
            if problems:
                return problems
            row = Row(text, label, row_digest(text, label_key(label)), row_digest(text), split)
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
        column = self._columns.names["messages"]
        messages = as_messages(values.get(column))
        if messages is not None and (messages[-1].get("role") or messages[-1].get("from")) in _ASKING:
            messages = [*messages, {"role": "assistant", "content": "-"}]  # the checks expect an answer at the end
        row = self._chat({**values, column: messages} if messages else values, None, problems)
        return row.input

    def _cell(self, values: Mapping[str, Any], name: str, problems: list[Problem]) -> str | None:
        """A column's text; None if a problem was found."""
        column = self._columns.names[name]
        if column not in values:
            problems.append(Problem("missing column", column, column))
            return None
        text = _as_text(values[column])
        if text is None:
            problems.append(_told("malformed line", f"{column} is a {type(values[column]).__name__}, not a text"))
        elif bad := UNDECODABLE.search(text):
            shown = shorten(text[max(0, bad.start() - 20) :])
            problems.append(Problem("bad encoding", shown, f"{column} has {NOT_UTF8}"))
            return None
        return text

    def _text(self, values: Mapping[str, Any], name: str, problems: list[Problem]) -> str:
        text = self._cell(values, name, problems)
        if text is None:
            return ""
        self._check_length(text, self._columns.names[name], problems)
        return normal_line_ends(text)

    def _answers(self, values: Mapping[str, Any], problems: list[Problem]) -> list[str]:
        """The right answers of a row, each once; the first one is learned."""
        column = self._columns.names["completion"]
        listed = list_of_answers(values.get(column))
        if listed is None:
            return [self._text(values, "completion", problems)]
        if not listed:
            problems.append(_told("empty text", f"{column} has no answer"))
        answers = dict.fromkeys(self._text({column: each}, "completion", problems) for each in listed)
        return list(answers)

    def _prompt(self, values: Mapping[str, Any], problems: list[Problem]) -> str:
        """The prompt, with the row's context, if any, on the lines under it."""
        prompt = self._text(values, "prompt", problems)
        column = self._columns.names.get("context")
        context = self._cell(values, "context", problems) if column in values else None
        if column is None or context is None or not context.strip():
            return prompt
        prompt = f"{prompt}\n{normal_line_ends(context)}"
        if not problems:
            self._check_length(prompt, f"{self._columns.names['prompt']} with {column}", problems)
        return prompt

    def _check_length(self, text: str, column: str, problems: list[Problem]) -> None:
        if not text.strip():
            problems.append(_told("empty text", f"{column} is empty"))
        elif len(text) > self._max_text_chars:
            length = f"{len(text)} characters"
            why = f"{column} has {length}, allowed are {self._max_text_chars}"
            problems.append(Problem("over-long text", f"{length}: {shorten(text)}", why))

    def label(self, values: Mapping[str, Any], problems: list[Problem]) -> str:
        """The label in the task's spelling; problems are appended to `problems`."""
        text = self._cell(values, "label", problems)
        if text is None:
            return ""
        cell = " ".join(text.split())
        label = self._label_names.get(cell, cell)
        if self._label_of_key and label_key(label) not in self._label_of_key:
            label = cell  # the task was learned with the cells as its labels
        if not label:
            problems.append(_told("empty label", f"{self._columns.names['label']} is empty"))
        elif not self._label_of_key and self._label_names and cell not in self._label_names:
            problems.append(Problem("label outside the task's set", shorten(cell), "the file has no name for it"))
        elif not self._label_of_key:
            self._check_length(label, self._columns.names["label"], problems)
        elif label_key(label) not in self._label_of_key:
            why = _NAME_IT if is_whole_number(label) else ""
            problems.append(Problem("label outside the task's set", shorten(label), why))
        return self._label_of_key.get(label_key(label), label)

    def split(self, values: Mapping[str, Any], problems: list[Problem]) -> Split | None:
        """The split that the file names, or None; problems are appended to `problems`."""
        name = self._columns.splitting
        if name is None:
            return None
        text = self._cell(values, name, problems)
        split = None if text is None else _SPLITS[name].get(text.strip().casefold())
        if text is not None and split is None:
            why = f"neither {' nor '.join(_SPLITS[name])}"
            problems.append(Problem("unknown split", f"{shorten(text)!r} is {why}", why))
        return split

    def _chat(self, values: Mapping[str, Any], split: Split | None, problems: list[Problem]) -> Row:
        names = self._columns.names
        wanted = [names[name] for name in ("messages", "prompt", "completion") if name in names]
        if missing := [column for column in wanted if column not in values]:
            problems += [Problem("missing column", column, column) for column in missing]
            return _NO_ROW
        cell = values[wanted[0]] if len(wanted) == 1 else _joined([values[column] for column in wanted])
        cell, answers = split_answers(cell)
        messages = parse_messages(cell, self._cell_of(values, "tools"))
        if isinstance(messages, Problem):
            problems.append(messages)
            return _NO_ROW
        column = " and ".join(wanted)
        if is_any_empty(messages):
            problems.append(_told("empty text", f"a message in {column} is empty"))
        else:
            texts = [part for message in messages for part in message_parts(message)[1:]]
            self._check_length("".join(texts), column, problems)
            for other in answers[1:]:
                self._check_other(other, column, problems)
        if problems:
            return _NO_ROW
        return chat_row(messages, [normal_line_ends(each) for each in answers[1:]])._replace(split=split)

    def _check_other(self, answer: str, column: str, problems: list[Problem]) -> None:
        """Check a further right answer of a chat."""
        if not answer.strip():
            problems.append(_told("empty text", f"a right answer in {column} is empty"))
        elif UNDECODABLE.search(answer):
            problems.append(Problem("bad encoding", shorten(answer), f"{column} has {NOT_UTF8}"))
        else:
            self._check_length(answer, column, problems)

    def _cell_of(self, values: Mapping[str, Any], name: str) -> Any:
        """A cell of an optional column; None if there is none."""
        return values.get(self._columns.names[name]) if name in self._columns.names else None


def list_of_answers(cell: object) -> Sequence[str] | None:
    """The texts of a cell that lists right answers, plainly or as SQuAD does under text; None for any other cell."""
    found = cell.get("text") if isinstance(cell, dict) else cell
    is_list = isinstance(found, (list, tuple)) and all(type(each) is str for each in found)
    return found if is_list else None  # type: ignore[return-value]


def _several(answers: Sequence[str]) -> tuple[str, ...]:
    """As `Row.references`."""
    return tuple(answers) if len(answers) > 1 else ()


def is_whole_number(label: str) -> bool:
    """Whether a label is a number, which says nothing about its meaning."""
    return _WHOLE_NUMBER.fullmatch(label) is not None


def _told(reason: Reason, why: str) -> Problem:
    """A problem whose value is no text of the row."""
    return Problem(reason, why, why)


def _joined(cells: Sequence[object]) -> object:
    """One list of several lists; the first cell that is not a list, if there is one."""
    lists = [as_messages(cell) for cell in cells]
    joined = [message for messages in lists if messages is not None for message in messages]
    return joined if None not in lists else cells[lists.index(None)]


def _as_text(value: object) -> str | None:
    """A cell as text; None if it is not a single value. Bytes that are not UTF-8 become lone surrogates."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # whole numbers are floats in a column with gaps
    return None if isinstance(value, (list, dict, tuple)) else str(value)


class GoodRows(NamedTuple):
    """The good rows of a batch as columns; the fields are those of `Row`."""

    places: npt.NDArray[np.int64]
    """The rows' places in the batch, in order."""
    inputs: pa.Array
    outputs: pa.Array
    digests: Digests
    input_digests: Digests
    is_test: npt.NDArray[np.bool_]
    """Whether the file says that these are test rows; False if it has no column for it."""
    references: pa.Array
    """Lists of all right answers; null for rows with one."""


class BadInBatch(NamedTuple):
    """A bad row, its place in the batch, and all its problems."""

    place: int
    raw: RawRow
    problems: list[Problem]


class BatchChecker:
    """Checks batches of one file, with the same results as `RowChecker`."""

    def __init__(self, task: TaskSchema, columns: Columns, max_text_chars: int) -> None:
        self._columns = columns
        self._max_text_chars = max_text_chars
        self._checker = RowChecker(task, columns, max_text_chars)

    def check(self, batch: RowBatch) -> tuple[GoodRows, list[BadInBatch]]:
        """The good rows, and the bad ones in order."""
        plain = self._plain_rows(batch)
        others = np.setdiff1d(np.arange(batch.num_rows), plain.places, assume_unique=True).tolist()
        bad, rows, places = [], [], []
        for place, raw in zip(others, batch.rows(others), strict=True):
            checked = self._checker.check(raw)
            if isinstance(checked, Row):
                rows.append(checked)
                places.append(place)
            else:
                bad.append(BadInBatch(place, raw, checked))
        return (_merge(plain, side_by_side(rows, places)) if rows else plain), bad

    def _plain_rows(self, batch: RowBatch) -> GoodRows:
        """The rows that a fast test shows to be good."""
        names = self._columns.names
        if self._columns.format == "chat" or "context" in names:
            return side_by_side([])
        input_, output = (batch.column(names[name]) for name in COLUMNS_OF_FORMAT[self._columns.format])
        inputs, input_parts = self._plain_texts(input_)
        if self._columns.format == "labelled":
            outputs, output_parts = _by_value(output, self._label, [pa.string(), pa.string()])
        else:
            outputs, output_parts = self._plain_texts(output)
        normal = pc.binary_join_element_wise("[", input_parts, ", ", output_parts, "]", "")
        normal_inputs = pc.binary_join_element_wise("[", input_parts, "]", "")
        is_test = pa.repeat(False, batch.num_rows)
        if self._columns.splitting is not None:
            (is_test,) = _by_value(batch.column(names[self._columns.splitting]), self._is_test, [pa.bool_()])
        is_plain = pc.and_(normal.is_valid(), is_test.is_valid())
        return GoodRows(
            places=np.flatnonzero(is_plain),
            inputs=inputs.filter(is_plain),
            outputs=outputs.filter(is_plain),
            digests=_digests(normal.filter(is_plain)),
            input_digests=_digests(normal_inputs.filter(is_plain)),
            is_test=np.array(is_test.filter(is_plain), np.bool_),
            references=pa.nulls(pc.sum(is_plain).as_py() or 0, REFERENCES.type),
        )

    def _plain_texts(self, cells: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Texts that are stored unchanged, and the same as `quote_normal` quotes them; null for texts not plain."""
        is_short = pc.less_equal(pc.binary_length(cells), self._max_text_chars)  # a text has no fewer bytes than chars
        if not pc.all(is_short).as_py():  # long texts would take most of the time
            cells = pc.if_else(is_short, cells, None)
        is_plain = pc.match_substring_regex(cells, _PLAIN_TEXT)
        texts = pc.if_else(is_plain, cells, None)
        escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
        return texts, pc.binary_join_element_wise('"', escaped, '"', "")

    def _label(self, cell: str) -> tuple[str, str] | None:
        """A cell's label, and its key as quoted for the digest; None if the label is not good."""
        problems: list[Problem] = []
        label = self._checker.label({self._columns.names["label"]: cell}, problems)
        return None if problems else (label, quote_normal(label_key(label)))

    def _is_test(self, cell: str) -> tuple[bool] | None:
        problems: list[Problem] = []
        split = self._checker.split({self._columns.names[self._columns.splitting or ""]: cell}, problems)
        return None if problems else (split == "test",)


def _digests(texts: pa.Array) -> Digests:
    sha256 = hashlib.sha256
    return as_digests(b"".join([sha256(each).digest() for each in texts.cast(pa.binary()).to_pylist()]))


def _by_value(
    cells: pa.Array, resolve: Callable[[str], tuple[Any, ...] | None], types: Sequence[pa.DataType]
) -> list[pa.Array]:
    """Resolve each cell, calling `resolve` once per distinct value; null for None."""
    encoded = cells.dictionary_encode()
    found = [resolve(value) or (None,) * len(types) for value in encoded.dictionary.to_pylist()]
    return [pa.array([each[i] for each in found], kind).take(encoded.indices) for i, kind in enumerate(types)]


def side_by_side(rows: Sequence[Row], places: Sequence[int] | None = None) -> GoodRows:
    """Rows as columns; without places, the rows count from 0."""
    return GoodRows(
        places=np.array(range(len(rows)) if places is None else places, np.int64),
        inputs=pa.array([row.input for row in rows], pa.string()),
        outputs=pa.array([row.output for row in rows], pa.string()),
        digests=as_digests(b"".join([row.digest for row in rows])),
        input_digests=as_digests(b"".join([row.input_digest for row in rows])),
        is_test=np.array([row.split == "test" for row in rows], np.bool_),
        references=pa.array([row.references or None for row in rows], REFERENCES.type),
    )


def _merge(one: GoodRows, other: GoodRows) -> GoodRows:
    """Merge both in the order of their places."""
    places = np.concatenate([one.places, other.places])
    order = np.argsort(places)
    return GoodRows(
        places=places[order],
        inputs=pa.concat_arrays([one.inputs, other.inputs]).take(pa.array(order)),
        outputs=pa.concat_arrays([one.outputs, other.outputs]).take(pa.array(order)),
        digests=np.concatenate([one.digests, other.digests])[order],
        input_digests=np.concatenate([one.input_digests, other.input_digests])[order],
        is_test=np.concatenate([one.is_test, other.is_test])[order],
        references=pa.concat_arrays([one.references, other.references]).take(pa.array(order)),
    )
