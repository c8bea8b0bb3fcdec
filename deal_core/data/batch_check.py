"""Check batches of rows: plain rows together by column, all other rows one by one with `RowChecker`.

A row is plain if a fast test shows that it is good: a text of common characters in normal form with single spaces, and
a label of the task. The results are those of `RowChecker`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deal_core.data.check import RowChecker
from deal_core.data.columns import Columns
from deal_core.data.rows import Digests, Problem, RawRow, Row, RowBatch, as_digests, hex_array, quote_normal
from deal_core.data.schema import COLUMNS_OF_FORMAT, REFERENCES, REJECTED, ROW_SCHEMA, Split, TaskSchema, label_key

PLAIN = "!-~¡-ʯЀ-ҁҊ-ԯ‐-‧‰-⁞₠-₿ぁ-ゖァ-ヺ一-鿿가-힣！-～\U0001f300-\U0001faff"
"""Characters other than white space that Unicode's form NFC does not change, alone or next to each other."""
_PLAIN_TEXT = f"^[{PLAIN}]+(?: [{PLAIN}]+)*$"


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
    rejected: pa.Array
    """The worse answers; null for rows that are no preferences."""

    def table(self, rows: npt.NDArray[np.int64], split: Split) -> pa.Table:
        """Some of the rows, by their indices, as a dataset stores them: only test rows keep several right answers."""
        places = pa.array(rows)
        columns = [column.take(places) for column in (self.inputs, self.outputs, hex_array(self.digests))]
        table = pa.Table.from_arrays(columns, schema=ROW_SCHEMA)
        references, rejected = self.references.take(places), self.rejected.take(places)
        if split == "test" and references.null_count < len(references):
            table = table.append_column(REFERENCES, references)
        return table.append_column(REJECTED, rejected) if rejected.null_count < len(rejected) else table


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
        if self._columns.format == "chat" or "context" in names or self._columns.has_preferences:
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
            rejected=pa.nulls(pc.sum(is_plain).as_py() or 0, REJECTED.type),
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
        rejected=pa.array([row.rejected for row in rows], REJECTED.type),
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
        rejected=pa.concat_arrays([one.rejected, other.rejected]).take(pa.array(order)),
    )
