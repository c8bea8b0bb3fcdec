"""The checks of a batch give the same results as the checks of single rows, and DigestSet behaves like a set."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.data.batch_check import PLAIN, BatchChecker
from deal_core.data.check import RowChecker
from deal_core.data.columns import Columns
from deal_core.data.reading.parquet_rows import ParquetBatch
from deal_core.data.reading.readers import read_batches
from deal_core.data.rows import (
    DigestSet,
    RawRow,
    Row,
    RowList,
    as_digests,
    grouped,
    hex_array,
    stored_input_digest,
)
from deal_core.data.schema import TaskSchema

PIECES = [
    "late", "parcel", "7", '"no"', "back\\slash", "\\u0000", "café", "cafe\u0301", "\u0301", "東京", "が", "か\u3099",
    "각", "\u1100\u1161", "\u11a8", "가", "🚚", "“so”", "—", "Å", "\u212b", "ﬁ", "ЙЯ", "и\u0306", "\u2028", "\u00a0",
    "\u3000", "\x1f", " ", "  ", "\n", "\r\n", "\r", "\t", "\x85", "\x00", "\x7f", "\ufeff", "\u200b", "x" * 9,
    "\u0344", "ά",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=6).map("".join)
SPACED = st.lists(st.sampled_from(PIECES), max_size=4).map(" ".join)
ODD = st.sampled_from([None, 3, -4, 10**30, 2.0, 2.5, float("nan"), True, ["a"], {"a": 1}, "\ud800", b"caf\xe9", b"ok"])
LABELS = st.sampled_from(["Dog", "dog", " DOG\n", "cat", "c at", "CAT", "bird", "", " ", "3", "b" * 30, "do\0g", "é"])
SPLITS = st.sampled_from(["train", "test", " Test", "validation", ""])
ROWS = st.lists(
    st.fixed_dictionaries({"a": TEXTS | SPACED | ODD}, optional={"b": LABELS | TEXTS | ODD, "s": SPLITS | ODD}),
    max_size=12,
)
TASKS = {
    "labels": (TaskSchema(name="t", labels=("Dog", "cat", "3")), {"text": "a", "label": "b"}),
    "any label": (TaskSchema(name="t"), {"text": "a", "label": "b"}),
    "split": (TaskSchema(name="t", labels=("Dog", "cat")), {"text": "a", "label": "b", "split": "s"}),
    "completion": (TaskSchema(name="t", format="completion"), {"prompt": "a", "completion": "b"}),
    "completion, split": (TaskSchema(name="t", format="completion"), {"prompt": "a", "completion": "b", "split": "s"}),
    "chat": (TaskSchema(name="t", format="chat"), {"messages": "a"}),
}


def assert_checked_alike(batch: Any, kind: str) -> None:
    """The results of the batch equal the results of its single rows."""
    task, names = TASKS[kind]
    columns = Columns(format=task.format, names=names)
    good, bad = BatchChecker(task, columns, 24).check(batch)
    checker = RowChecker(task, columns, 24)
    checked = {place: checker.check(raw) for place, raw in enumerate(batch.rows(range(batch.num_rows)))}
    rows = {place: row for place, row in checked.items() if isinstance(row, Row)}
    assert {each.place: each.problems for each in bad} == {p: c for p, c in checked.items() if p not in rows}
    assert [each.place for each in bad] == sorted(set(checked) - set(rows))
    assert all(each.raw.number == each.place + 1 for each in bad)
    assert good.places.tolist() == list(rows)
    assert good.inputs.to_pylist() == [row.input for row in rows.values()]
    assert good.outputs.to_pylist() == [row.output for row in rows.values()]
    assert [bytes(digest) for digest in good.digests] == [row.digest for row in rows.values()]
    assert [bytes(digest) for digest in good.input_digests] == [row.input_digest for row in rows.values()]
    assert {row.input_digest for row in rows.values()} == {
        stored_input_digest(columns.format, row.input) for row in rows.values()
    }
    assert good.is_test.tolist() == [row.split == "test" for row in rows.values()]


@pytest.mark.parametrize("kind", TASKS)
@settings(max_examples=80, deadline=None)
@given(rows=ROWS)
def test_a_batch_is_checked_as_its_rows_are(kind: str, rows: list[dict[str, Any]]) -> None:
    batch = RowList([RawRow(number=number, values=values) for number, values in enumerate(rows, start=1)])
    assert_checked_alike(batch, kind)


@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind != "chat"])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXTS | SPACED | st.none() | st.just(b"caf\xe9"), LABELS | TEXTS | st.none(), SPLITS)),
    text_type=st.sampled_from([pa.string(), pa.large_string()]),
    packs_labels=st.booleans(),
    cut=st.integers(0, 4),
)
def test_a_batch_of_a_parquet_file_is_checked_as_its_rows_are(
    kind: str, rows: list[tuple[Any, Any, str]], text_type: pa.DataType, packs_labels: bool, cut: int
) -> None:
    wide = pa.large_binary() if text_type == pa.large_string() else pa.binary()
    texts, labels, splits = ([row[i] for row in rows] for i in range(3))
    cells = pa.array([text.encode() if isinstance(text, str) else text for text in texts], wide).view(text_type)
    label_cells = pa.array(labels, pa.string())
    columns = [cells, label_cells.dictionary_encode() if packs_labels else label_cells, pa.array(splits, pa.string())]
    batch = pa.RecordBatch.from_arrays(columns, names=["a", "b", "s"])
    assert_checked_alike(ParquetBatch([batch.slice(0, cut), batch.slice(cut)], [0, 1, 2], 1), kind)


@pytest.mark.parametrize("numbers", [pa.int8(), pa.uint64(), pa.float64(), pa.bool_(), pa.decimal128(20, 1)])
def test_labels_that_are_no_texts_are_checked_as_one_by_one(numbers: pa.DataType) -> None:
    labels = pa.array([1, 0, 1, None] * 3).cast(numbers)
    batch = pa.RecordBatch.from_arrays([pa.array([f"text {i}" for i in range(12)]), labels], names=["a", "b"])
    assert_checked_alike(ParquetBatch([batch], [0, 1], 1), "any label")


def test_plain_characters_are_no_white_space_and_stay_as_they_are_in_normal_form() -> None:
    """Each character alone, and after any character that composes with a following one."""
    found = [c for c in map(chr, range(sys.maxunicode + 1)) if re.match(f"[{PLAIN}]", c)]
    assert len(found) > 30_000
    assert not any(c.isspace() or unicodedata.combining(c) for c in found)
    for before in ("", "a", "か", "가", "ᄀ"):
        changed = [c for c in found if unicodedata.normalize("NFC", before + c) != before + c]
        assert not changed
    assert unicodedata.is_normalized("NFC", "".join(found))


def test_where_reading_fails_the_rows_before_are_a_batch() -> None:
    def items() -> Iterator[tuple[str, int]]:
        yield "read", 1
        raise EOFError

    groups = grouped(items(), 9)
    assert next(groups) == ["read"]
    with pytest.raises(EOFError):
        next(groups)


def test_a_batch_ends_at_its_number_of_rows_or_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deal_core.data.rows.BATCH_CHARS", 10)
    sizes = [1, 1, 1, 1, 6, 6, 4, 1, 11, 99, 2]
    assert list(grouped(zip(sizes, sizes, strict=True), 3)) == [[1, 1, 1], [1, 6], [6, 4], [1], [11], [99], [2]]


def test_rows_of_a_parquet_file_are_picked_whatever_their_types(tmp_path: Path) -> None:
    """Few rows of a batch and many; Arrow's own take has no kernel for the one column."""
    columns = {"view": pa.array(["x", "y"] * 200, pa.string_view()), "list": [[number] for number in range(400)]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    (batch,) = read_batches(tmp_path / "rows.parquet")
    for places in ([], [3, 300], list(range(0, 400, 2)), list(range(400))):
        rows = batch.rows(places)
        assert [row.number for row in rows] == [place + 1 for place in places]
        assert [row.values for row in rows] == [{"view": "xy"[place % 2], "list": [place]} for place in places]
        assert [row.raw() for row in rows] == [row.values for row in rows]


DIGESTS = st.integers(0, 12).map(lambda i: hashlib.sha256(bytes([i])).digest())
COLLIDING = st.tuples(st.binary(min_size=1, max_size=1), st.binary(min_size=2, max_size=2)).map(
    lambda ends: ends[0] + bytes(29) + ends[1]  # one slot for all; many end in NUL
)


@settings(max_examples=100, deadline=None)
@given(batches=st.lists(st.lists(DIGESTS | COLLIDING, max_size=30), max_size=6))
def test_a_set_of_digests_is_a_set(batches: list[list[bytes]]) -> None:
    ours, python = DigestSet(), set()
    for batch in batches:
        assert ours.contains(as_digests(b"".join(batch))).tolist() == [digest in python for digest in batch]
        is_new = []
        for digest in batch:
            is_new.append(digest not in python)
            python.add(digest)
        assert ours.add(as_digests(b"".join(batch))).tolist() == is_new
        assert len(ours) == len(python)
    assert bytes(ours.in_order()) == b"".join(sorted(python))


def test_a_large_set_of_digests_grows_and_keeps_all() -> None:
    digests = as_digests(b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(20_000)))
    ours = DigestSet()
    assert all(ours.add(digests[start : start + 700]).all() for start in range(0, 20_000, 700))
    assert not ours.add(digests).any()
    assert len(ours) == 20_000
    assert bytes(ours.in_order()) == bytes(np.sort(digests.view("S32")))


def test_digests_are_written_as_python_writes_them() -> None:
    digests = as_digests(bytes(range(64)))
    assert hex_array(digests).to_pylist() == [bytes(digest).hex() for digest in digests]
    assert hex_array(digests[:0]).to_pylist() == []


def test_a_batch_of_a_parquet_file_holds_many_small_rows_and_few_large_ones(tmp_path: Path) -> None:
    """This holds too if large rows are small in the file: all have one text, which the dictionary holds once."""
    texts = [*(f"small {number}" for number in range(3000)), *["x" * 20_000] * 1000]
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet", compression="zstd")
    batches = list(read_batches(tmp_path / "rows.parquet"))
    assert batches[0].num_rows == 2816
    assert max(batch.num_rows for batch in batches[1:]) == 256
    assert [row.values["text"] for batch in batches for row in batch.rows(range(batch.num_rows))] == texts
    assert [text for batch in batches for text in batch.column("text").to_pylist()] == texts
