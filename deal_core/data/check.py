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

from deal_core.data.columns import Columns
from deal_core.data.rows import Digests, Problem, RawRow, Row, RowBatch, as_digests, quote_normal, row_digest
from deal_core.data.schema import COLUMNS_OF_FORMAT, Format, Split, TaskSchema, label_key
from deal_core.safe_text import shorten

_SPLITS: dict[str, Split] = {"train": "train", "test": "test"}
_UNDECODABLE = re.compile("[\x00\ud800-\udfff]")
_NO_ROW = Row("", "", b"", b"", None)
PLAIN = "!-~¡-ʯЀ-ҁҊ-ԯ‐-‧‰-⁞₠-₿ぁ-ゖァ-ヺ一-鿿가-힣！-～\U0001f300-\U0001faff"
"""Characters other than white space that Unicode's form NFC does not change, alone or next to each other."""
_PLAIN_TEXT = f"^[{PLAIN}]+(?: [{PLAIN}]+)*$"


def normal_line_ends(text: str) -> str:
    """The text with Unix line ends."""
    return text.replace("\r\n", "\n")


def normal_input(kind: Format, text: str) -> str:
    """An input in the form in which datasets store it. The model learned this form, so questions must use it too."""
    if kind == "chat":
        messages = [{**each, "content": normal_line_ends(each["content"])} for each in json.loads(text)]
        return json.dumps(messages, ensure_ascii=False)
    text = normal_line_ends(text)
    return text.strip() if kind == "labelled" else text


class RowChecker:
    """Turns the raw rows of one file into good rows or lists of problems."""

    def __init__(self, task: TaskSchema, columns: Columns, max_text_chars: int) -> None:
        self._columns = columns
        self._max_text_chars = max_text_chars
        self._label_of_key = {label_key(label): label for label in task.labels}

    def check(self, raw: RawRow) -> Row | list[Problem]:
        """The good row, or all its problems. If the task has no labels yet, every label is good."""
        if raw.fault is not None:
            return [raw.fault]
        problems: list[Problem] = []
        split = self.split(raw.values, problems)
        if self._columns.format == "chat":
            row = self._chat(raw.values, split, problems)
        elif self._columns.format == "completion":
            prompt = self._text(raw.values, "prompt", problems)
            completion = self._text(raw.values, "completion", problems)
            if problems:  # computing the digest of a very long text would take long
                return problems
            row = Row(prompt, completion, row_digest(prompt, completion), row_digest(prompt), split)
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
            name = "prompt" if self._columns.format == "completion" else "text"
            text = normal_input(self._columns.format, self._text(raw.values, name, problems))
        return problems or text

    def _conversation(self, values: Mapping[str, Any], problems: list[Problem]) -> str:
        """The messages before the wanted answer."""
        column = self._columns.names["messages"]
        messages = _as_messages(values.get(column))
        if messages is not None and messages[-1].get("role") == "user":
            messages = [*messages, {"role": "assistant", "content": "-"}]  # the checks expect an answer at the end
        row = self._chat({**values, column: messages} if messages else values, None, problems)
        return row.input

    def _cell(self, values: Mapping[str, Any], name: str, problems: list[Problem]) -> str | None:
        """A column's text; None if a problem was found."""
        column = self._columns.names[name]
        if column not in values:
            problems.append(Problem("missing column", column))
            return None
        text = _as_text(values[column])
        if text is None:
            problems.append(Problem("malformed line", f"{column} is a {type(values[column]).__name__}, not a text"))
        elif bad := _UNDECODABLE.search(text):
            problems.append(Problem("bad encoding", shorten(text[max(0, bad.start() - 20) :])))
            return None
        return text

    def _text(self, values: Mapping[str, Any], name: str, problems: list[Problem]) -> str:
        text = self._cell(values, name, problems)
        if text is None:
            return ""
        self._check_length(text, self._columns.names[name], problems)
        return normal_line_ends(text)

    def _check_length(self, text: str, column: str, problems: list[Problem]) -> None:
        if not text.strip():
            problems.append(Problem("empty text", f"{column} is empty"))
        elif len(text) > self._max_text_chars:
            problems.append(Problem("over-long text", f"{len(text)} characters: {shorten(text)}"))

    def label(self, values: Mapping[str, Any], problems: list[Problem]) -> str:
        """The label in the task's spelling; problems are appended to `problems`."""
        text = self._cell(values, "label", problems)
        if text is None:
            return ""
        label = " ".join(text.split())
        if not label:
            problems.append(Problem("empty label", f"{self._columns.names['label']} is empty"))
        elif not self._label_of_key:
            self._check_length(label, self._columns.names["label"], problems)
        elif label_key(label) not in self._label_of_key:
            problems.append(Problem("label outside the task's set", shorten(label)))
        return self._label_of_key.get(label_key(label), label)

    def split(self, values: Mapping[str, Any], problems: list[Problem]) -> Split | None:
        """The split that the file names, or None; problems are appended to `problems`."""
        if "split" not in self._columns.names:
            return None
        text = self._cell(values, "split", problems)
        split = None if text is None else _SPLITS.get(text.strip().casefold())
        if text is not None and split is None:
            problems.append(Problem("unknown split", f"{shorten(text)!r} is neither train nor test"))
        return split

    def _chat(self, values: Mapping[str, Any], split: Split | None, problems: list[Problem]) -> Row:
        column = self._columns.names["messages"]
        if column not in values:
            problems.append(Problem("missing column", column))
            return _NO_ROW
        messages = _parse_messages(values[column])
        if isinstance(messages, Problem):
            problems.append(messages)
            return _NO_ROW
        *earlier, (_, answer) = messages
        contents = [content for _, content in messages]
        if not all(content.strip() for content in contents):
            problems.append(Problem("empty text", f"a message in {column} is empty"))
        else:
            self._check_length("".join(contents), column, problems)
        if problems:
            return _NO_ROW
        input = json.dumps([{"role": role, "content": content} for role, content in earlier], ensure_ascii=False)
        parts = [part for message in earlier for part in message]
        return Row(input, answer, row_digest(*parts, answer), row_digest(*parts), split)


def _as_text(value: object) -> str | None:
    """A cell as text; None if it is not a single value. Bytes that are not UTF-8 become lone surrogates."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # whole numbers are floats in a column with gaps
    return None if isinstance(value, (list, dict, tuple)) else str(value)


def _as_messages(value: object) -> list[dict[str, Any]] | None:
    """A cell's messages; None if it is not a list of dicts."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    return None


def _parse_messages(value: object) -> list[tuple[str, str]] | Problem:
    """The (role, content) pairs of a conversation that ends with the assistant's answer."""

    def malformed(why: str) -> Problem:
        return Problem("malformed messages", f"{why}: {shorten(value)}")

    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return malformed("not JSON")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return malformed("not a list of messages")
    pairs = [(message.get("role"), message.get("content")) for message in value]
    if not all(isinstance(role, str) and isinstance(content, str) for role, content in pairs):
        return malformed("a message's role or content is missing or is not a text")
    texts = [(str(role), normal_line_ends(str(content))) for role, content in pairs]
    if bad := _UNDECODABLE.search("\n".join(part for pair in texts for part in pair)):
        return Problem("bad encoding", f"{shorten(bad.group())} in {shorten(value)}")
    roles = [role for role, _ in texts]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        return malformed(
            f"roles {shorten(', '.join(roles))}; wanted are system (or none), then user and assistant in turn"
        )
    return texts


class GoodRows(NamedTuple):
    """The good rows of a batch as columns; the fields are those of `Row`."""

    places: npt.NDArray[np.int64]
    """The rows' places in the batch, in order."""
    inputs: pa.Array
    outputs: pa.Array
    digests: Digests
    input_digests: Digests
    is_test: npt.NDArray[np.bool_]
    """Whether the file's column "split" says test; False if there is no such column."""


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
        return (_merge(plain, _side_by_side(rows, places)) if rows else plain), bad

    def _plain_rows(self, batch: RowBatch) -> GoodRows:
        """The rows that a fast test shows to be good."""
        names = self._columns.names
        if self._columns.format == "chat":
            return _side_by_side([], [])
        input_, output = (batch.column(names[name]) for name in COLUMNS_OF_FORMAT[self._columns.format])
        inputs, input_parts = self._plain_texts(input_)
        if self._columns.format == "labelled":
            outputs, output_parts = _by_value(output, self._label, [pa.string(), pa.string()])
        else:
            outputs, output_parts = self._plain_texts(output)
        normal = pc.binary_join_element_wise("[", input_parts, ", ", output_parts, "]", "")
        normal_inputs = pc.binary_join_element_wise("[", input_parts, "]", "")
        is_test = pa.repeat(False, batch.num_rows)
        if "split" in names:
            (is_test,) = _by_value(batch.column(names["split"]), self._is_test, [pa.bool_()])
        is_plain = pc.and_(normal.is_valid(), is_test.is_valid())
        return GoodRows(
            places=np.flatnonzero(is_plain),
            inputs=inputs.filter(is_plain),
            outputs=outputs.filter(is_plain),
            digests=_digests(normal.filter(is_plain)),
            input_digests=_digests(normal_inputs.filter(is_plain)),
            is_test=np.array(is_test.filter(is_plain), np.bool_),
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
        split = self._checker.split({self._columns.names["split"]: cell}, problems)
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


def _side_by_side(rows: list[Row], places: list[int]) -> GoodRows:
    return GoodRows(
        places=np.array(places, np.int64),
        inputs=pa.array([row.input for row in rows], pa.string()),
        outputs=pa.array([row.output for row in rows], pa.string()),
        digests=as_digests(b"".join([row.digest for row in rows])),
        input_digests=as_digests(b"".join([row.input_digest for row in rows])),
        is_test=np.array([row.split == "test" for row in rows], np.bool_),
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
    )
