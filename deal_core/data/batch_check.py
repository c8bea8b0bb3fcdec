"""Check a batch of rows: plain rows together by column, and all other rows one by one with `RowChecker`.

A row is plain if a fast test shows that it is good: its texts are of common characters in Unicode's normal form, and
its label is one of the task. A row that is checked with others gets what `RowChecker` would say of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deal_core.data.check import RowChecker
from deal_core.data.columns import Columns
from deal_core.data.good_rows import GOOD_ROWS, good_rows
from deal_core.data.reading.batches import RowBatch
from deal_core.data.reading.readers import read_batches
from deal_core.data.rows import Problem, Row, normal_part
from deal_core.data.schema import COLUMNS_OF_FORMAT, TaskSchema, label_key
from deal_core.data.source_files import SourceFile
from deal_core.errors import DataValidationError

PLAIN = "!-~¡-ʯЀ-ҁҊ-ԯ‐-‧‰-⁞₠-₿ぁ-ゖァ-ヺ一-鿿가-힣！-～\U0001f300-\U0001faff"
"""Characters that Unicode's form NFC does not change, alone or next to each other, and that are no white space."""
_BLANK = " \n\t"
_PLAIN_TEXT = f"^[{PLAIN}{_BLANK}]*[{PLAIN}][{PLAIN}{_BLANK}]*$"
_UNEVEN_BLANKS = "[\n\t]|  |^ | $"

BadRows = list[tuple[int, list[Problem]]]
"""Places of bad rows in their batch, and all problems of each."""


class Checked(NamedTuple):
    """What the checks found in a batch."""

    good: pa.RecordBatch
    """See GOOD_ROWS; in order of place."""
    bad: BadRows


class FileCheck(NamedTuple):
    """One file, and what its rows are checked by."""

    source: SourceFile
    task: TaskSchema
    columns: Columns
    max_text_chars: int

    def batches(self) -> Generator[tuple[RowBatch, Checked]]:
        """The batches of the file in order, and what was found in each.

        Raises:
            DataValidationError: The file cannot be read to its end.
        """
        checker = BatchChecker(self)
        with naming(self.source):
            for batch in read_batches(self.source.path, {*self.columns.names.values()}):
                yield batch, checker.check(batch)


class BatchChecker:
    """Checks the batches of one file."""

    def __init__(self, file: FileCheck) -> None:
        self._file, self._columns = file, file.columns
        self._checker = RowChecker(file.task, file.columns, file.max_text_chars)

    def check(self, batch: RowBatch) -> Checked:
        """The good rows, and all problems of the bad ones.

        Raises:
            DataValidationError: A row has a key that would have been read if the first rows had it.
        """
        self._refuse_late_keys(batch)
        good = self._plain_rows(batch)
        is_other = np.ones(len(batch), np.bool_)
        is_other[good.column("place").to_numpy()] = False
        others = np.flatnonzero(is_other).tolist()
        rows, places, bad = [], [], []
        for place, raw in zip(others, batch.rows(others), strict=True):
            found = self._checker.check(raw)
            if isinstance(found, Row):
                rows.append(found)
                places.append(place)
            else:
                bad.append((place, found))
        if rows:
            good = pa.concat_batches([good, good_rows(rows, places)])
            good = good.take(pa.array(np.argsort(good.column("place").to_numpy())))
        return Checked(good, bad)

    def _refuse_late_keys(self, batch: RowBatch) -> None:
        unread = self._columns.unread
        for raw in batch.rows() if unread else ():
            if not unread.isdisjoint(raw.values):
                key = min(unread.intersection(raw.values))
                raise DataValidationError(
                    f"{self._file.source.name}: row {raw.number} has the key {key}, which the first rows lack, so it "
                    "would not be read. Put a row with this key first, or leave the key out."
                )

    def _plain_rows(self, batch: RowBatch) -> pa.RecordBatch:
        """The rows that a fast test shows to be good."""
        names = self._columns.names
        if self._columns.format == "chat" or self._columns.has_preferences:
            return good_rows([])
        required = COLUMNS_OF_FORMAT[self._columns.format]
        asked, answer = required[0], required[-1]
        inputs = self._plain_texts(batch.texts(names[asked]))
        if self._columns.format == "labelled":
            inputs = pc.utf8_trim(inputs, _BLANK)
            outputs = _by_value(batch.texts(names[answer]), self._label)
            output_parts = _by_value(outputs, lambda label: normal_part(label_key(label)))
        else:
            if "context" in names:
                inputs = self._with_contexts(inputs, batch.texts(names["context"]))
            outputs = self._plain_texts(batch.texts(names[answer]))
            output_parts = _normal_parts(outputs)
        is_test = pa.repeat("", len(batch))
        if self._columns.splitting is not None:
            is_test = _by_value(batch.texts(names[self._columns.splitting]), self._split)
        input_parts = _normal_parts(inputs)
        is_plain = pc.and_(pc.and_(input_parts.is_valid(), output_parts.is_valid()), is_test.is_valid())
        input_parts, output_parts = input_parts.filter(is_plain), output_parts.filter(is_plain)
        places = pa.array(np.flatnonzero(is_plain))
        return pa.RecordBatch.from_arrays(
            [
                places,
                inputs.filter(is_plain),
                outputs.filter(is_plain),
                _sha256(pc.binary_join_element_wise("[", input_parts, ", ", output_parts, "]", "")),
                _sha256(pc.binary_join_element_wise("[", input_parts, "]", "")),
                pc.equal(is_test.filter(is_plain), "test"),
                *(pa.nulls(len(places), kind) for kind in GOOD_ROWS.types[-2:]),
            ],
            schema=GOOD_ROWS,
        )

    def _plain_texts(self, cells: pa.Array) -> pa.Array:
        """The texts that are plain and not too long; null for all others."""
        # The lengths come first: a search in very long texts would take long.
        cells = pc.if_else(pc.less_equal(pc.utf8_length(cells), self._file.max_text_chars), cells, None)
        return pc.if_else(pc.match_substring_regex(cells, _PLAIN_TEXT), cells, None)

    def _with_contexts(self, prompts: pa.Array, contexts: pa.Array) -> pa.Array:
        """The prompts with their contexts under them; null if a context is missing or not plain."""
        both = self._plain_texts(pc.binary_join_element_wise(prompts, contexts, "\n"))
        is_plain = pc.match_substring_regex(contexts, _PLAIN_TEXT)
        return pc.if_else(pc.equal(contexts, ""), prompts, pc.if_else(is_plain, both, None))

    def _label(self, cell: str) -> str | None:
        """The label that a cell names; None if the row is bad."""
        problems: list[Problem] = []
        label = self._checker.label({self._columns.names["label"]: cell}, problems)
        return None if problems else label

    def _split(self, cell: str) -> str | None:
        """The split that a cell names; None if the row is bad."""
        assert self._columns.splitting is not None, "asked only if the file has such a column"
        return self._checker.split({self._columns.names[self._columns.splitting]: cell}, [])


@contextmanager
def naming(file: SourceFile) -> Iterator[None]:
    """Put a file's name before a message that does not have it: the reader knows only the last part."""
    try:
        yield
    except DataValidationError as error:
        if file.name in str(error) or file.name.rpartition("/")[2] == file.name:
            raise
        raise DataValidationError(f"{file.name}: {error}", code=error.code) from error


def _normal_parts(texts: pa.Array) -> pa.Array:
    """Plain texts as `normal_part` writes them."""
    is_uneven = pc.match_substring_regex(texts, _UNEVEN_BLANKS)
    if pc.any(is_uneven).as_py():
        even = [" ".join(text.split()) for text in texts.filter(is_uneven).to_pylist()]
        texts = pc.replace_with_mask(texts, pc.fill_null(is_uneven, False), pa.array(even, pa.string()))
    escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
    return pc.binary_join_element_wise('"', escaped, '"', "")


def _sha256(texts: pa.Array) -> pa.Array:
    sha256 = hashlib.sha256
    digests = b"".join([sha256(text).digest() for text in texts.cast(pa.binary()).to_pylist()])
    return pa.Array.from_buffers(pa.binary(32), len(texts), [None, pa.py_buffer(digests)])


def _by_value(cells: pa.Array, resolve: Callable[[str], str | None]) -> pa.Array:
    """Each cell as `resolve` makes it, which is called once for each text; null stays null."""
    encoded = cells.dictionary_encode()
    try:
        values = encoded.dictionary.to_pylist()
    except UnicodeDecodeError:  # then the rows are checked one by one
        return pa.nulls(len(cells), pa.string())
    return pa.array(map(resolve, values), pa.string()).take(encoded.indices)
