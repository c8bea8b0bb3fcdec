"""The checks of a batch of rows: the plain ones together, a column at a time, the others one by one.

Plain is what shows no problem at a glance: a text of common characters in normal form with single spaces, a label of
the task. The others go through `RowChecker`, and what comes out is what it says of every row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deal_core.data.batches import RowBatch
from deal_core.data.check import RowChecker
from deal_core.data.columns import Columns
from deal_core.data.digest_set import Digests, as_digests
from deal_core.data.rows import Problem, RawRow, Row, quote_normal
from deal_core.data.schema import COLUMNS_OF_FORMAT, TaskSchema, label_key

PLAIN = "!-~¡-ʯЀ-ҁҊ-ԯ‐-‧‰-⁞₠-₿ぁ-ゖァ-ヺ一-鿿가-힣！-～\U0001f300-\U0001faff"
"""Characters that are no white space, and that Unicode's form NFC leaves as they are, one beside the other."""
_PLAIN_TEXT = f"^[{PLAIN}]+(?: [{PLAIN}]+)*$"


class GoodRows(NamedTuple):
    """The good rows of a batch, side by side; fields are those of `Row`."""

    places: npt.NDArray[np.int64]
    """Where in the batch they stand, in order."""
    inputs: pa.Array
    outputs: pa.Array
    digests: Digests
    input_digests: Digests
    is_test: npt.NDArray[np.bool_]
    """What the file's column of splits says; False where it has none."""


class BadInBatch(NamedTuple):
    """A bad row, where in the batch it stands, and all its problems."""

    place: int
    raw: RawRow
    problems: list[Problem]


class BatchChecker:
    """Does to the batches of one file what `RowChecker` does to its rows."""

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
        """Those that are good at a glance."""
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
        """Texts that are stored as they stand, and these as `quote_normal` quotes them; null where one is not plain."""
        is_short = pc.less_equal(pc.binary_length(cells), self._max_text_chars)  # bytes: never fewer than characters
        if not pc.all(is_short).as_py():  # the long ones would take most of the time
            cells = pc.if_else(is_short, cells, None)
        is_plain = pc.match_substring_regex(cells, _PLAIN_TEXT)
        texts = pc.if_else(is_plain, cells, None)
        escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
        return texts, pc.binary_join_element_wise('"', escaped, '"', "")

    def _label(self, cell: str) -> tuple[str, str] | None:
        """A cell's label, and how its key is quoted for the digest; None where it is not good."""
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
    """What each cell stands for, asked once for each value; null where that is nothing."""
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
    """Both, in the order of their places."""
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
