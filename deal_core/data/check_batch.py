"""The checks of a batch of rows: plain rows are checked together by column, other rows one by one.

A row is plain if a fast test shows that it is good: a text of common characters in normal form with single spaces, and
a label of the task. All other rows go through `RowChecker`. The result is the same as `RowChecker` gives for all rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deal_core.data.check import RowChecker
from deal_core.data.columns import Columns
from deal_core.data.rows import Problem, RawRow, Row, RowBatch, quote_normal
from deal_core.data.schema import COLUMNS_OF_FORMAT, TaskSchema, label_key

Digests = npt.NDArray[np.void]
"""Array of digests of 32 bytes each."""
DIGEST = np.dtype("V32")

_CHUNK = 2**16


class DigestSet:
    """A set of SHA-256 digests in about 50 bytes each; a Python set takes 130.

    It is an array in order of arrival, and a hash table of places in the array with open addressing.
    """

    def __init__(self) -> None:
        self._words = np.zeros((256, 4), np.uint64)
        self._table = np.zeros(1024, np.uint32)  # place + 1 in `_words`; 0: free
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def contains(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Which of the digests are in the set."""
        words = _words_of(digests)
        found = np.zeros(len(words), np.bool_)
        slots, open_ = self._slots(words), np.arange(len(words))
        while len(open_):
            places = self._table[slots[open_]]
            open_, places = open_[places > 0], places[places > 0]
            same = (self._words[places - 1] == words[open_]).all(axis=1)
            found[open_[same]] = True
            open_ = open_[~same]
            slots[open_] = self._next(slots[open_])
        return found

    def add(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Add the digests; return which are new, that is neither in the set nor earlier in `digests`."""
        words = _words_of(digests)
        start, end = self._size, self._size + len(words)
        self._reserve(end)
        self._words[start:end] = words
        is_new, slots = self._claim(start, end)
        self._size = start + int(is_new.sum())
        self._words[start : self._size] = words[is_new]
        self._table[slots[is_new]] = np.arange(start, self._size, dtype=np.uint32) + 1
        return is_new

    def in_order(self) -> memoryview:
        """The sorted digests, one after another. No digest can be added afterwards."""
        self._table = np.zeros(0, np.uint32)
        digests = self._words[: self._size].view("S32")  # all have 32 bytes, so NULs at the end do no harm
        digests.sort(axis=0)
        return digests.view(np.uint8).data

    def _claim(self, start: int, end: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Enter places of `_words` into the table if their digest is new; return which are new, and the slots."""
        words = self._words[start:end]
        is_new = np.zeros(len(words), np.bool_)
        slots, open_ = self._slots(words), np.arange(len(words))
        while len(open_):
            free = open_[self._table[slots[open_]] == 0]
            self._table[slots[free[::-1]]] = start + free[::-1] + 1  # of equal slots the last write wins: the first row
            places = self._table[slots[open_]].astype(np.int64) - 1
            own = places == start + open_
            is_new[open_[own]] = True
            open_, places = open_[~own], places[~own]
            open_ = open_[(self._words[places] != words[open_]).any(axis=1)]
            slots[open_] = self._next(slots[open_])
        return is_new, slots

    def _reserve(self, size: int) -> None:
        if size > len(self._words):
            self._words.resize((size + size // 8, 4), refcheck=False)
        if size > len(self._table) // 2:
            self._table = np.zeros(1 << int(3 * size).bit_length(), np.uint32)
            for start in range(0, self._size, _CHUNK):
                self._claim(start, min(start + _CHUNK, self._size))

    def _slots(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return words[:, 1] & np.uint64(len(self._table) - 1)  # not the first word, which decides the split

    def _next(self, slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return (slots + np.uint64(1)) & np.uint64(len(self._table) - 1)


def merged(*ordered: memoryview) -> Iterator[bytes]:
    """Merge sorted digests of several sets into one order. The result comes in pieces, to save memory."""
    bounds = np.arange(1, 256, dtype=np.uint8).view("S1").astype("S32")
    sets = [np.frombuffer(each, "S32") for each in ordered]
    for pieces in zip(*(np.split(each, np.searchsorted(each, bounds)) for each in sets), strict=True):
        yield np.sort(np.concatenate(pieces), kind="stable").tobytes()


def as_digests(digests: bytes) -> Digests:
    """An array of concatenated digests."""
    return np.frombuffer(digests, DIGEST)


def first_words(digests: Digests) -> npt.NDArray[np.uint32]:
    """The first four bytes of each digest, as a number."""
    return np.ascontiguousarray(digests).view(">u4")[::8]


def hex_array(digests: Digests) -> pa.Array:
    """The digests as texts of 64 characters."""
    offsets = np.arange(len(digests) + 1, dtype=np.int32) * 64
    return pa.Array.from_buffers(
        pa.string(), len(digests), [None, pa.py_buffer(offsets), pa.py_buffer(digests.tobytes().hex().encode())]
    )


def _words_of(digests: Digests) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 4)


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
