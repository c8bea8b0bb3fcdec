"""The checks of a batch give what the checks of its rows give, one by one, whatever the rows are."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deal_core.data.batch_check import PLAIN, BatchChecker, FileCheck
from deal_core.data.check import RowChecker
from deal_core.data.columns import Columns
from deal_core.data.good_rows import digests_in, hex_texts, rows_in
from deal_core.data.reading.batches import JsonRows, ParquetRows, RowBatch
from deal_core.data.rows import Row
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import DataValidationError

MAX_CHARS = 24
PIECES = [
    "late", "parcel", "7", '"no"', "back\\slash", "\\u0000", "café", "cafe\u0301", "\u0301", "東京", "が", "か\u3099",
    "각", "\u1100\u1161", "\u11a8", "가", "🚚", "“so”", "—", "Å", "\u212b", "ﬁ", "ЙЯ", "и\u0306", "\u2028", "\u00a0",
    "\u3000", "\x1f", " ", "  ", "\n", "\r\n", "\r", "\t", "\x85", "\x00", "\x7f", "\ufeff", "\u200b", "x" * 9,
    "\u0344", "ά",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=6).map("".join)
SPACED = st.lists(st.sampled_from(PIECES), max_size=4).map(" ".join)
ODD = st.sampled_from([None, 3, -4, 10**30, 2.0, 2.5, float("nan"), True, ["a"], ["a", "b"], {"a": 1}, "\ud800"])
LABELS = st.sampled_from(["Dog", "dog", " DOG\n", "cat", "c at", "CAT", "bird", "", " ", "3", "b" * 30, "do\0g", "é"])
SPLITS = st.sampled_from(["train", "test", " Test", "validation", ""])
ROWS = st.lists(
    st.fixed_dictionaries(
        {"a": TEXTS | SPACED | ODD},
        optional={"b": LABELS | TEXTS | ODD, "s": SPLITS | ODD, "c": st.sampled_from(["", " "]) | TEXTS | ODD},
    ),
    max_size=12,
)
COMPLETION = {"prompt": "a", "completion": "b"}
TASKS = {
    "labels": (TaskSchema(name="t", labels=("Dog", "cat", "3")), {"text": "a", "label": "b"}),
    "any label": (TaskSchema(name="t"), {"text": "a", "label": "b"}),
    "split": (TaskSchema(name="t", labels=("Dog", "cat")), {"text": "a", "label": "b", "split": "s"}),
    "completion": (TaskSchema(name="t", format="completion"), COMPLETION),
    "context": (TaskSchema(name="t", format="completion"), {**COMPLETION, "context": "c"}),
    "preferences": (TaskSchema(name="t", format="completion"), {**COMPLETION, "rejected": "c"}),
    "chat": (TaskSchema(name="t", format="chat"), {"messages": "a"}),
}


def check_of(kind: str, **unread: Any) -> FileCheck:
    task, names = TASKS[kind]
    (source,) = files_at(Path("rows.jsonl"))
    return FileCheck(source, task, Columns(format=task.format, names=names, **unread), MAX_CHARS)


def json_rows(rows: list[dict[str, Any]]) -> JsonRows:
    """Rows as the process that reads a text sends them."""
    frame = [[number, values, number, None, None, None] for number, values in enumerate(rows, start=1)]
    return JsonRows(json.dumps(frame, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def assert_checked_alike(batch: RowBatch, kind: str) -> None:
    """What is found in the batch equals what is found in its rows."""
    file = check_of(kind)
    good, bad = BatchChecker(file).check(batch)
    checker = RowChecker(file.task, file.columns, MAX_CHARS)
    found = [checker.check(raw) for raw in batch.rows()]
    rows = {place: row for place, row in enumerate(found) if isinstance(row, Row)}
    assert bad == [(place, problems) for place, problems in enumerate(found) if place not in rows]
    assert good.column("place").to_pylist() == list(rows)
    assert rows_in(good) == [row._replace(split=None) for row in rows.values()]
    assert good.column("is_test").to_pylist() == [row.split == "test" for row in rows.values()]
    assert [bytes(digest) for digest in digests_in(good, "digest")] == [row.digest for row in rows.values()]


@pytest.mark.parametrize("kind", TASKS)
@settings(max_examples=60)
@given(rows=ROWS)
@example(rows=[{"a": " late\n", "b": "cat", "c": "", "s": "test"}, {"a": "a  \n\tb\\", "b": "Dog", "c": '"c"\n'}])
def test_a_batch_of_a_text_file_is_checked_as_its_rows_are(kind: str, rows: list[dict[str, Any]]) -> None:
    assert_checked_alike(json_rows(rows), kind)


@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind not in ("chat", "preferences")])
@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(TEXTS | SPACED | st.none() | st.just(b"caf\xe9"), LABELS | TEXTS | st.just(b"caf\xe9"), SPLITS, TEXTS)
    ),
    text_type=st.sampled_from([pa.string(), pa.large_string()]),
    cut=st.integers(0, 4),
)
def test_a_batch_of_a_parquet_file_is_checked_as_its_rows_are(
    kind: str, rows: list[tuple[Any, Any, str, str]], text_type: pa.DataType, cut: int
) -> None:
    wide = pa.large_binary() if text_type == pa.large_string() else pa.binary()
    columns = [
        pa.array([cell.encode() if isinstance(cell, str) else cell for cell in cells], wide).view(text_type)
        for cells in (zip(*rows, strict=True) if rows else [[]] * 4)
    ]
    batch = pa.RecordBatch.from_arrays(columns, names=["a", "b", "s", "c"])
    assert_checked_alike(ParquetRows(batch.slice(cut), 1, None), kind)


@pytest.mark.parametrize("numbers", [pa.int8(), pa.uint64(), pa.float64(), pa.bool_(), pa.decimal128(20, 1)])
def test_labels_that_are_no_texts_are_checked_as_one_by_one(numbers: pa.DataType) -> None:
    labels = pa.array([1, 0, 1, None] * 30).cast(numbers)
    batch = pa.RecordBatch.from_arrays([pa.array([f"text {i}" for i in range(120)]), labels], names=["a", "b"])
    assert_checked_alike(ParquetRows(batch, 1, None), "any label")


def test_most_rows_are_checked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, a change could send every row the slow way, and nothing but the clock would tell."""
    checked: list[int] = []
    one = RowChecker.check
    monkeypatch.setattr(RowChecker, "check", lambda self, raw: checked.append(raw.number) or one(self, raw))
    rows = [{"a": f'ü "{i}"\n\n  two  🚚', "b": " DOG" if i % 2 else "cat"} for i in range(50)]
    good, bad = BatchChecker(check_of("labels")).check(json_rows([*rows, {"a": "", "b": "cat"}]))
    assert (good.num_rows, len(bad), checked) == (50, 1, [51])
    context = [{"a": f"sum {i}", "c": "" if i % 2 else f"{i}\n{i}", "b": "one\ntwo"} for i in range(50)]
    assert BatchChecker(check_of("context")).check(json_rows(context)).good.num_rows == 50
    assert checked == [51]


def test_a_key_that_the_first_rows_lack_is_refused_by_its_row() -> None:
    rows = json_rows([{"a": "one", "b": "cat"}, {"a": "two", "b": "cat", "split": "test"}])
    with pytest.raises(DataValidationError, match=r"rows\.jsonl: row 2 has the key split"):
        BatchChecker(check_of("labels", unread=frozenset({"split"}))).check(rows)


def test_plain_characters_are_no_white_space_and_stay_as_they_are_in_normal_form() -> None:
    """Each character alone, and after any character that composes with a following one."""
    found = [c for c in map(chr, range(sys.maxunicode + 1)) if re.match(f"[{PLAIN}]", c)]
    assert len(found) > 30_000
    assert not any(c.isspace() or unicodedata.combining(c) for c in found)
    for before in ("", "a", "か", "가", "ᄀ"):
        changed = [c for c in found if unicodedata.normalize("NFC", before + c) != before + c]
        assert not changed
    assert unicodedata.is_normalized("NFC", "".join(found))


def test_rows_of_a_batch_are_picked_whatever_their_types() -> None:
    """Few rows of a batch and many; Arrow's own take has no kernel for the one column."""
    columns = {"view": pa.array(["x", "y"] * 200, pa.string_view()), "list": [[number] for number in range(400)]}
    batch = ParquetRows(pa.RecordBatch.from_pydict(columns), 7, ["list"])
    for places in ([], [3, 300], [*range(0, 400, 2)], [*range(400)]):
        rows = batch.rows(places)
        assert [row.number for row in rows] == [place + 7 for place in places]
        assert [row.values for row in rows] == [{"list": [place]} for place in places]
        assert [row.raw() for row in rows] == [{"view": "xy"[place % 2], "list": [place]} for place in places]


def test_digests_are_written_as_python_writes_them() -> None:
    column = pa.array([bytes(range(start, start + 32)) for start in (0, 32, 64)], pa.binary(32))
    batch = pa.RecordBatch.from_arrays([column], names=["digest"]).slice(1)
    assert hex_texts(digests_in(batch, "digest")).to_pylist() == [digest.hex() for digest in column.to_pylist()[1:]]
    assert hex_texts(digests_in(batch.slice(2), "digest")).to_pylist() == []
