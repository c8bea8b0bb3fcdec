"""Good rows of a batch as columns of Arrow, and their digests as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deal_core.data.digest_set import Digests
from deal_core.data.rows import Row
from deal_core.data.schema import REFERENCES, REJECTED

GOOD_ROWS = pa.schema(
    [
        ("place", pa.int64()),
        ("input", pa.string()),
        ("output", pa.string()),
        ("digest", pa.binary(32)),
        ("input_digest", pa.binary(32)),
        ("is_test", pa.bool_()),
        REFERENCES,
        REJECTED,
    ]
)
"""place: the row's place in its batch, from 0. is_test: whether the file names the row as a test row; false if it names
no splits. references: null for a row with one right answer. The others are the fields of `Row`."""


def good_rows(
    rows: Sequence[Row], places: Sequence[int] | None = None, is_test: Sequence[bool] | None = None
) -> pa.RecordBatch:
    """Rows as columns; without places, they count from 0."""
    columns = {
        "place": range(len(rows)) if places is None else places,
        "input": [row.input for row in rows],
        "output": [row.output for row in rows],
        "digest": [row.digest for row in rows],
        "input_digest": [row.input_digest for row in rows],
        "is_test": [False] * len(rows) if is_test is None else is_test,
        "references": [row.references or None for row in rows],
        "rejected": [row.rejected for row in rows],
    }
    return pa.RecordBatch.from_pydict(columns, schema=GOOD_ROWS)


def rows_in(good: pa.RecordBatch) -> list[Row]:
    """The rows one by one."""
    names = ("input", "output", "digest", "input_digest", "references", "rejected")
    return [
        Row(input, output, digest, input_digest, tuple(references or ()), rejected)
        for input, output, digest, input_digest, references, rejected in zip(
            *(good.column(name).to_pylist() for name in names), strict=True
        )
    ]


def chosen(good: pa.RecordBatch, is_chosen: npt.NDArray[np.bool_]) -> pa.RecordBatch:
    """Some of the rows, in order."""
    return good if is_chosen.all() else good.filter(pa.array(is_chosen))


def digests_in(good: pa.RecordBatch, name: str) -> Digests:
    """A column of digests as an array."""
    column = good.column(name)
    return np.frombuffer(column.buffers()[1] or b"", "V32")[column.offset : column.offset + len(column)]


def hex_texts(digests: Digests) -> pa.Array:
    """Digests as texts of 64 characters."""
    offsets = np.arange(len(digests) + 1, dtype=np.int32) * 64
    texts = np.ascontiguousarray(digests).tobytes().hex().encode()
    return pa.Array.from_buffers(pa.string(), len(digests), [None, pa.py_buffer(offsets), pa.py_buffer(texts)])
