"""Rows are checked by column, and what is found of a row does not depend on the rows around it."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deal_core.data.arrow_rows import rows_in
from deal_core.data.columns import Columns
from deal_core.data.reading.batches import ParquetRows, RowBatch, RowList
from deal_core.data.row_checks import RowChecker, normal_input
from deal_core.data.rows import Problem, RawRow, input_parts, row_digests, stored_input_digest
from deal_core.data.schema import TaskSchema, label_key

PIECES = [
    "late", "parcel", "7", '"no"', "back\\slash", "\\u0000", "café", "cafe\u0301", "東京", "か\u3099", "🚚", "ﬁ",
    "\u2028", "\u00a0", "\x1f", " ", "\n", "\r\n", "\r", "\t", "\x00", "\u200b", "x" * 20,
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=6).map("".join)
ODD = st.sampled_from([None, 3, 10**30, 2.0, 2.5, float("nan"), True, ["a"], ["a", "b"], [], {"a": 1}, "\ud800"])
LABELS = st.sampled_from(["Dog", "dog", " DOG\n", "cat", "c at", "bird", "", " ", "3", "3.0", "b" * 30, "do\0g"])
SPLITS = st.sampled_from(["train", "test", " Test", "validation", ""])
ROWS = st.lists(
    st.fixed_dictionaries(
        {"a": TEXTS | ODD}, optional={"b": LABELS | TEXTS | ODD, "s": SPLITS | ODD, "c": st.just(" ") | TEXTS | ODD}
    ),
    max_size=8,
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
    "chat in two columns": (TaskSchema(name="t", format="chat"), COMPLETION),
}


def checker_of(kind: str, max_text_chars: int = 24) -> RowChecker:
    task, names = TASKS[kind]
    assert task.format != "auto"
    return RowChecker(task, Columns(format=task.format, names=names), max_text_chars)


def found_in(batch: RowBatch, kind: str) -> list[Any]:
    """Of each row its problems, or the good row and whether it is a test row."""
    good, bad = checker_of(kind).check(batch)
    is_test = good.column("is_test").to_pylist()
    places = good.column("place").to_pylist()
    found = {**bad, **{place: each for place, *each in zip(places, rows_in(good), is_test, strict=True)}}
    assert [*bad] == sorted(bad) and places == sorted(places) and sorted(found) == [*range(len(batch))]
    return [found[place] for place in range(len(batch))]


def raw_rows(rows: list[dict[str, Any]]) -> list[RawRow]:
    return [RawRow(number, values) for number, values in enumerate(rows, start=1)]


@pytest.mark.parametrize("kind", TASKS)
@settings(max_examples=40)
@given(rows=ROWS)
@example(rows=[{"a": " late\n", "b": "cat", "c": "", "s": "test"}, {"a": "a  \n\tb\\", "b": "Dog", "c": '"c"\n'}])
@example(rows=[{"a": [{"role": "user", "content": "hi"}], "b": [{"role": "assistant", "content": "ho"}]}, {"a": "x"}])
def test_a_row_is_found_the_same_alone_and_among_others(kind: str, rows: list[dict[str, Any]]) -> None:
    raws = raw_rows(rows)
    found = found_in(RowList(raws), kind)
    assert found == [each for raw in raws for each in found_in(RowList([raw]), kind)]
    form = TASKS[kind][0].format
    assert form != "auto"
    inputs = checker_of(kind).check_inputs(RowList(raws))
    for raw, (row, *more), input in zip(raws, found, inputs, strict=True):
        if isinstance(row, Problem):
            assert isinstance(input, str) or {*input} <= {row, *more}
            continue
        assert input == row.input, "a question has the form that was learned"
        assert row.input_digest == stored_input_digest(form, row.input)
        answers = row.references or (label_key(row.output) if form == "labelled" else row.output,)
        if row.rejected is None:
            assert row.digest == row_digests(input_parts(form, row.input), answers)[0]
        if form != "chat" and isinstance(raw.values["a"], str) and "c" not in raw.values:
            assert normal_input(form, raw.values["a"]) == row.input, "as clients ask"


@pytest.mark.parametrize("kind", [kind for kind in TASKS if not kind.startswith("chat")])
@settings(max_examples=30)
@given(
    rows=st.lists(
        st.tuples(TEXTS | st.none() | st.just(b"caf\xe9"), LABELS | TEXTS | st.just(b"caf\xe9"), SPLITS, TEXTS)
    ),
    text_type=st.sampled_from([pa.string(), pa.large_string()]),
    cut=st.integers(0, 4),
)
def test_rows_of_parquet_are_found_as_those_of_json(
    kind: str, rows: list[tuple[Any, Any, str, str]], text_type: pa.DataType, cut: int
) -> None:
    wide = pa.large_binary() if text_type == pa.large_string() else pa.binary()
    columns = [
        pa.array([cell.encode() if isinstance(cell, str) else cell for cell in cells], wide).view(text_type)
        for cells in (zip(*rows, strict=True) if rows else [[]] * 4)
    ]
    batch = pa.RecordBatch.from_arrays(columns, names=["a", "b", "s", "c"]).slice(cut)
    raws = raw_rows([dict(zip("absc", row, strict=True)) for row in rows[cut:]])
    assert found_in(ParquetRows(batch, 1, None), kind) == found_in(RowList(raws), kind)


def test_a_row_that_cannot_be_read_has_that_problem_alone() -> None:
    fault = Problem("malformed line", "no JSON")
    for kind in TASKS:
        assert found_in(RowList([RawRow(1, {}, fault=fault)]), kind) == [[fault]]
        assert checker_of(kind).check_inputs(RowList([RawRow(1, {}, fault=fault)])) == [[fault]]


def asked(kind: str, values: dict[str, Any]) -> Any:
    """The stored input, or the reasons of its problems."""
    (found,) = checker_of(kind, max_text_chars=100).check_inputs(RowList([RawRow(1, values)]))
    return found if isinstance(found, str) else [problem.reason for problem in found]


def test_an_input_is_checked_without_its_answer() -> None:
    assert asked("labels", {"a": " good "}) == "good"
    assert asked("labels", {"a": ""}) == ["empty text"]
    assert asked("labels", {}) == ["missing column"]
    assert asked("labels", {"a": "x" * 101}) == ["over-long text"]
    assert asked("context", {"a": "Do", "c": "it"}) == "Do\nit"


def test_a_chat_is_asked_up_to_the_answer_that_is_wanted() -> None:
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    for messages in ([user], [user, answer], json.dumps([user]), [{"from": "human", "value": "hi"}]):
        assert asked("chat", {"a": messages}) == json.dumps([user])
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {}}]}
    with_tool = json.loads(asked("chat", {"a": [user, call, {"role": "tool", "content": "2"}]}))
    assert [message["role"] for message in with_tool] == ["user", "assistant", "tool"]
    for wrong in ([], [answer], "no JSON", [user, user], None):
        assert asked("chat", {"a": wrong}) == ["malformed messages"]
