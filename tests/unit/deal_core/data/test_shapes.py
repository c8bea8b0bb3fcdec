"""Every common shape of a file is learned rightly, or refused with what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError
from deal_core.data.schema import TaskSchema
from deal_core.errors import DataValidationError
from tests.built import AUTO, Built, build, check, write_rows

datasets.disable_progress_bars()
NUM_ROWS = 40
Row = dict[str, Any]
Stored = tuple[str, ...]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str | list[str] | None, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def rows(make: Callable[[int], Row]) -> list[Row]:
    return [make(number) for number in range(NUM_ROWS)]


def stored(built: Built) -> list[Stored]:
    """Input and output of each row, and its worse answer if it is a preference."""
    names = ("input", "output", "rejected")
    return sorted(tuple(row[name] for name in names if name in row) for row in built.rows())


def from_list(content: list[Row]) -> datasets.Dataset:
    is_class = "text" in content[0] and isinstance(content[0].get("label"), int)
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["World news", "Sport"])}
    return datasets.Dataset.from_list(content, features=datasets.Features(kinds) if is_class else None)


WRITERS: dict[str, Callable[[list[Row], Path], object]] = {
    "pandas.jsonl": lambda content, path: pd.DataFrame(content).to_json(path, orient="records", lines=True),
    "pandas.json": lambda content, path: pd.DataFrame(content).to_json(path, orient="records", indent=2),
    "columns.json": lambda content, path: pd.DataFrame(content).to_json(path),
    "pandas.csv": lambda content, path: pd.DataFrame(content).to_csv(path, index=False),
    "datasets.jsonl": lambda content, path: from_list(content).to_json(path),
    "datasets.parquet": lambda content, path: from_list(content).to_parquet(path),
    "arrow.parquet": lambda content, path: write_rows(path, content),
}
"""File → how people write it."""
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
STORED_CALL = {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def tool_chat(number: int) -> Row:
    result = {"role": "tool", "tool_call_id": "c1", "content": f"rain {number}"}
    calling = assistant(None, tool_calls=[CALL])
    return {
        "messages": [user(f"Weather {number}?"), calling, result, assistant(f"It rains {number}.")],
        "tools": [TOOL],
    }


def stored_tool_chat(number: int) -> str:
    call = assistant("", tool_calls=[STORED_CALL])
    result = {"role": "tool", "content": f"rain {number}", "tool_call_id": "c1"}
    return json.dumps([{**user(f"Weather {number}?"), "tools": [TOOL]}, call, result])


def asked(number: int) -> str:
    return json.dumps([user(f"Hi {number}")])


class Shape(NamedTuple):
    """A file that is learned."""

    make: Callable[[int], Row]
    writer: str
    shape: str
    """Words of the recognised shape."""
    stored: Callable[[int], Stored]
    """See `stored`."""


SHAPES = {
    "Alpaca": Shape(
        lambda i: {"instruction": f"Translate {i}.", "input": f"Wort {i}" if i % 2 else "", "output": f"word {i}"},
        *("pandas.json", "Alpaca rows (instruction with input under it, output)"),
        lambda i: (f"Translate {i}.\nWort {i}" if i % 2 else f"Translate {i}.", f"word {i}"),
    ),
    "ShareGPT": Shape(
        lambda i: {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": f"Hello {i}"}]},
        *("datasets.parquet", "ShareGPT chats (conversations)"),
        lambda i: (asked(i), f"Hello {i}"),
    ),
    "OpenAI messages": Shape(
        lambda i: {"messages": [user(f"Hi {i}"), assistant(f"Hello {i}")]},
        *("datasets.jsonl", "chats (messages)"),
        lambda i: (asked(i), f"Hello {i}"),
    ),
    "OpenAI messages with tool calls in Parquet": Shape(
        tool_chat,
        *("arrow.parquet", "chats with tools (messages)"),
        lambda i: (stored_tool_chat(i), f"It rains {i}."),
    ),
    "chat whose answer is a list": Shape(
        lambda i: {"messages": [user(f"Hi {i}"), assistant([f"Hello {i}", "Hey"])]},
        *("pandas.jsonl", "chats (messages)"),
        lambda i: (asked(i), f"Hello {i}"),
    ),
    "TRL conversational": Shape(
        lambda i: {"prompt": [user(f"Hi {i}")], "completion": [assistant(f"Hello {i}")]},
        *("datasets.parquet", "chats in two columns (prompt, completion)"),
        lambda i: (asked(i), f"Hello {i}"),
    ),
    "TRL conversational, messages as JSON texts": Shape(
        lambda i: {"prompt": asked(i), "completion": json.dumps([{"from": "gpt", "value": "Hello"}])},
        *("pandas.jsonl", "chats in two columns (prompt, completion)"),
        lambda i: (asked(i), "Hello"),
    ),
    "answers that are JSON lists": Shape(
        lambda i: {"prompt": json.dumps([{"page": i}]), "completion": json.dumps([{"name": "Ann", "age": i}])},
        *("pandas.jsonl", "completions (prompt, completion)"),
        lambda i: (json.dumps([{"page": i}]), json.dumps([{"name": "Ann", "age": i}])),
    ),
    "ClassLabel": Shape(
        lambda i: {"text": f"Text {i}", "label": i % 2},
        *("datasets.parquet", "ClassLabel names the labels"),
        lambda i: (f"Text {i}", ("World news", "Sport")[i % 2]),
    ),
    "preference, explicit prompt": Shape(
        lambda i: {"prompt": f"Q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
        *("datasets.parquet", "preferences (prompt, chosen over rejected)"),
        lambda i: (f"Q {i}", f"good {i}", f"bad {i}"),
    ),
    "preference of JSON lists": Shape(
        lambda i: {"prompt": json.dumps([{"page": i}]), "chosen": json.dumps([{"age": i}]), "rejected": "[]"},
        *("pandas.jsonl", "preferences (prompt, chosen over rejected)"),
        lambda i: (json.dumps([{"page": i}]), json.dumps([{"age": i}]), "[]"),
    ),
    "preference, conversational": Shape(
        lambda i: {"prompt": [user(f"Hi {i}")], "chosen": [assistant("good")], "rejected": [assistant(f"bad {i}")]},
        *("datasets.parquet", "preferences of chats (prompt, chosen over rejected)"),
        lambda i: (asked(i), "good", f"bad {i}"),
    ),
    "preference, implicit prompt in Parquet": Shape(
        lambda i: {"chosen": [user(f"Hi {i}"), assistant("good")], "rejected": [user(f"Hi {i}"), assistant("bad")]},
        *("datasets.parquet", "preferences of chats (chosen over rejected)"),
        lambda i: (asked(i), "good", "bad"),
    ),
    "preference, whole chats in Parquet, and the prompt once more": Shape(
        lambda i: {
            "prompt": f"Hi {i}",
            "chosen": [user(f"Hi {i}"), assistant("good")],
            "rejected": [user(f"Hi {i}"), assistant("bad")],
        },
        *("datasets.parquet", "preferences of chats (chosen over rejected)"),
        lambda i: (asked(i), "good", "bad"),
    ),
    "SQuAD in JSON lines": Shape(
        lambda i: {"context": "c", "question": f"Who? {i}", "answers": {"text": ["He", "Him"], "answer_start": [0, 1]}},
        *("datasets.jsonl", "completions (question with context under it, answers)"),
        lambda i: (f"Who? {i}\nc", "He"),
    ),
    "answers in a list": Shape(
        lambda i: {"question": f"Who? {i}", "answers": [f"He {i}", "Him"]},
        *("arrow.parquet", "completions (question, answers)"),
        lambda i: (f"Who? {i}", f"He {i}"),
    ),
}
REFUSED: list[tuple[str, Row, str]] = [
    (
        "datasets.jsonl",
        {"chosen": "Human: Assistant: good", "rejected": "bad"},
        "has a prompt in each row, or whole chats",
    ),
    ("datasets.parquet", {"prompt": "Q", "completion": "A", "label": True}, "rated answers.*whose label is true"),
    ("pandas.jsonl", {"prompt": "Q", "completion": "A", "label": False}, "rated answers"),
    ("pandas.csv", {"prompt": "Q", "completion": "A", "label": True}, "rated answers"),
    ("datasets.parquet", {"text": "long"}, "continued pre-training.*prompt and completion in place of text"),
    ("datasets.jsonl", {"id": 1, "url": "x", "text": "long"}, "--set task.columns.*continued pre-training"),
    ("arrow.parquet", {"text": "Text", "label": [1, 2]}, "label is a list, not a text"),
    ("pandas.csv", {"text": "Text", "label": 1}, r'labels: \{"0": NAME, "1": NAME\}'),
    ("columns.json", {"text": "Text", "label": "a"}, r'orient="records", lines=True'),
]


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_of_a_common_shape_is_learned_rightly(name: str, tmp_path: Path) -> None:
    make, writer, shape, wanted = SHAPES[name]
    WRITERS[writer](rows(make), tmp_path / writer)
    task = TaskSchema(name="t", format="auto", assistant_turns="all")
    assert shape in check(tmp_path / writer, task).shape
    built = build(tmp_path / writer, task)
    assert (built.manifest.num_read, built.manifest.num_rejected) == (NUM_ROWS, 0)
    assert stored(built) == sorted(wanted(number) for number in range(NUM_ROWS))


@pytest.mark.parametrize(("writer", "row", "remedy"), REFUSED)
def test_a_file_that_would_be_learned_wrongly_is_refused_with_a_remedy(
    writer: str, row: Row, remedy: str, tmp_path: Path
) -> None:
    WRITERS[writer]([row] * NUM_ROWS, tmp_path / writer)
    with pytest.raises(DataValidationError, match=f"(?s){remedy}"):
        build(tmp_path / writer, AUTO, DataConfig())


class Asked(NamedTuple):
    """A file that is read as the task says."""

    make: Callable[[int], Row]
    task: Row
    stored: Callable[[int], Stored]
    file: str = "rows.jsonl"


ASKED = {
    "the chosen answers alone": Asked(
        lambda i: {"prompt": f"Q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
        {"columns": {"completion": "chosen"}},
        lambda i: (f"Q {i}", f"good {i}"),
    ),
    "the chosen chats alone": Asked(
        lambda i: {"chosen": [user(f"Hi {i}"), assistant("good")], "rejected": [user(f"Hi {i}")]},
        {"columns": {"messages": "chosen"}},
        lambda i: (asked(i), "good"),
    ),
    "numbers for labels are named": Asked(
        lambda i: {"text": f"Text {i}", "label": i % 2},
        {"labels": ("bad", "good"), "label_names": {"0": "bad", "1": "good"}},
        lambda i: (f"Text {i}", ("bad", "good")[i % 2]),
        "rows.csv",
    ),
    "numbers for labels are listed": Asked(
        lambda i: {"text": f"Text {i}", "label": i % 2},
        {"labels": ("0", "1")},
        lambda i: (f"Text {i}", str(i % 2)),
        "rows.csv",
    ),
    "a prompt that the task names has no context": Asked(
        lambda i: {"instruction": f"Do {i}", "context": "more", "output": f"done {i}"},
        {"columns": {"prompt": "instruction"}},
        lambda i: (f"Do {i}", f"done {i}"),
    ),
    "a known task joins a context as a new one": Asked(
        lambda i: {"question": f"Who {i}?", "context": "Ada", "answer": f"a{i}"},
        {"format": "completion"},
        lambda i: (f"Who {i}?\nAda", f"a{i}"),
    ),
    "preference columns beside a complete row are not read": Asked(
        lambda i: {"prompt": f"Q {i}", "completion": f"A {i}", "chosen": "x", "rejected": "y"},
        {},
        lambda i: (f"Q {i}", f"A {i}"),
    ),
    "preferences in named columns beside other answers": Asked(
        lambda i: {"prompt": f"Q {i}", "completion": f"A {i}", "good": f"x {i}", "bad": f"y {i}"},
        {"columns": {"chosen": "good", "rejected": "bad"}},
        lambda i: (f"Q {i}", f"x {i}", f"y {i}"),
    ),
    "one question has several pairs of answers": Asked(
        lambda i: {"prompt": f"Q {i // 2}", "chosen": "good", "rejected": f"bad {i % 2}"},
        {},
        lambda i: (f"Q {i // 2}", "good", f"bad {i % 2}"),
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_file_is_read_as_the_task_says(name: str, tmp_path: Path) -> None:
    make, fields, wanted, file = ASKED[name]
    built = build(
        write_rows(tmp_path / file, rows(make)),
        TaskSchema(**{"name": "t", "format": "auto", "metric": "auto", **fields}),
    )
    assert stored(built) == sorted(wanted(number) for number in range(NUM_ROWS))
    is_preference = len(wanted(0)) > 2
    assert built.manifest.task.learns_preferences == (built.manifest.task.metric == "preference") == is_preference


# --- labels


@pytest.mark.parametrize(
    ("file", "cells", "names", "num_bad"),
    [
        ("rows.jsonl", (True, False), {"true": "spam", "false": "ham"}, 0),
        ("rows.csv", ("Yes", "NO"), {"yes": "spam", "no": "ham"}, 0),
        ("rows.csv", ("yes", "no"), {"Yes": "spam", "No": "ham"}, 0),
        ("rows.csv", ("1.0", "0.0"), {"1": "spam", "0": "ham"}, 0),  # an int column with gaps, as pandas writes it
        ("rows.csv", ("M", "m"), {"M": "spam", "m": "ham"}, 0),
        ("rows.csv", ("M", "m", "M", "Ｍ"), {"M": "spam", "m": "ham"}, NUM_ROWS // 4),
        ("rows.csv", ("Yes", "yes", "YES", "yes"), {"Yes": "spam", "yes": "ham"}, NUM_ROWS // 4),  # both fit YES
    ],
)
def test_label_names_are_found_in_any_case(
    file: str, cells: tuple[object, ...], names: dict[str, str], num_bad: int, tmp_path: Path
) -> None:
    content = rows(lambda i: {"text": f"Text {i}", "label": cells[i % len(cells)]})
    built = build(write_rows(tmp_path / file, content), TaskSchema(name="t", labels=("spam", "ham"), label_names=names))
    wanted = {f"Text {i}": ("spam", "ham")[i % 2] for i in range(NUM_ROWS)}
    assert built.manifest.problems.get("label outside the task's set", 0) == built.manifest.num_rejected == num_bad
    assert all(wanted[input] == output for input, output in stored(built))


def test_numbers_are_never_taken_for_places_in_the_list_of_labels(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", rows(lambda i: {"text": f"Text {i}", "label": 1 + i % 2}))
    with pytest.raises(ArrivalRefusedError, match="outside the task's set: a whole number"):
        build(tmp_path / "rows.csv", TaskSchema(name="t", labels=("a", "b")), DataConfig())


def test_class_labels_fit_a_task_that_learned_their_numbers_or_their_names(tmp_path: Path) -> None:
    """-1 is no label, as `datasets` has it."""
    content = rows(lambda i: {"text": f"Text {i}", "label": i % 2 if i else -1})
    from_list(content).to_parquet(tmp_path / "rows.parquet")
    for labels in (("0", "1"), ("sport", "World News"), ()):
        built = build(tmp_path / "rows.parquet", TaskSchema(name="t", labels=labels))
        assert dict(built.manifest.problems) == {"label outside the task's set": 1}
        assert {output for _, output in stored(built)} == set(labels or ("World news", "Sport"))


@pytest.mark.parametrize(
    "metadata", [b"", b"[]", b"{}", b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}', b"\xff"]
)
def test_metadata_of_another_form_name_no_labels(metadata: bytes, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": ["x", "y"]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert {*check(tmp_path / "rows.parquet").manifest.task.labels} == {"x", "y"}


def rated(*labels: object) -> list[Row]:
    """Completions with these labels in turn."""
    return rows(lambda i: {"prompt": f"Q {i}", "completion": f"A {i}", "label": labels[i % len(labels)]})


@pytest.mark.parametrize("labels", [("TRUE", "FALSE"), ("true", "", " false")])
def test_a_csv_may_write_the_rating_as_it_likes(labels: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataValidationError, match="holds rated answers"):
        check(write_rows(tmp_path / "rows.csv", rated(*labels)))


@pytest.mark.parametrize("labels", [("true", "false", "unknown"), ("",), ("easy", "hard")])
def test_a_csv_whose_labels_are_no_rating_is_learned(labels: tuple[str, ...], tmp_path: Path) -> None:
    report = check(write_rows(tmp_path / "rows.csv", rated(*labels)))
    assert report.shape == "completions (prompt, completion)" and report.manifest.num_rejected == 0
    texts = rows(lambda i: {"text": f"Text {i}", "label": i % 2 == 0})
    assert {*check(write_rows(tmp_path / "rows.csv", texts)).manifest.task.labels} == {"True", "False"}


# --- several right answers


def test_test_rows_keep_every_right_answer_and_training_rows_the_first(tmp_path: Path) -> None:
    """Also if the first list comes late in the file, after rows that are written already."""
    monkeys = ["ape", "monkey", "ape"]
    source = write_rows(
        tmp_path / "a.jsonl", rows(lambda i: {"prompt": f"Q {i}", "completion": monkeys if i > 30 else f"A {i}"})
    )
    assert check(source).num_several == 9
    built = build(source)
    assert all([*row] == ["input", "output", "sha256"] for row in built.rows("train"))
    found = {row["input"]: row["references"] for row in built.rows("test")}
    wanted = {f"Q {i}": ["ape", "monkey"] if i > 30 else None for i in range(NUM_ROWS)}
    assert found == {text: wanted[text] for text in found} and len({str(each) for each in found.values()}) == 2


def test_a_list_of_one_answer_is_the_same_row_as_the_answer(tmp_path: Path) -> None:
    def with_answer(answer: Any) -> Built:
        return build(write_rows(tmp_path / "a.jsonl", rows(lambda i: {"prompt": f"Q {i}", "completion": answer})))

    alike = [with_answer(answer) for answer in ("A", ["A"], ["A", "A"])]
    assert all(row["references"] is None for row in alike[-1].rows("test"))
    digests = {built.manifest.sha256 for built in alike}
    assert len(digests) == 1 and with_answer(["A", "B"]).manifest.sha256 not in digests, "other answers, other tests"


def test_rows_without_an_answer_or_with_a_bad_one_are_bad_rows(tmp_path: Path) -> None:
    bad = [[], ["A", " "], ["A", "b" * 30_000], [1, 2], {"text": []}, ["A", "\u0000"]]
    content = rows(lambda i: {"prompt": f"Q {i}", "completion": bad[i] if i < len(bad) else "A"})
    report = check(write_rows(tmp_path / "a.jsonl", content))
    assert [(row.row, row.problems[0].why) for row in report.bad_rows] == [
        (1, "completion has no answer"),
        (2, "completion is empty"),
        (3, "completion has 30000 characters, allowed are 20000"),
        (4, "completion is a list, not a text"),
        (5, "completion has no answer"),
        (6, "completion has a byte that is not UTF-8, or a NUL"),
    ]
    chats = rows(lambda i: {"messages": [user(f"Hi {i}"), assistant(["A", ""])]})
    assert dict(check(write_rows(tmp_path / "a.jsonl", chats)).manifest.problems) == {"empty text": NUM_ROWS}


# --- pairs of answers


def test_pairs_that_teach_nothing_are_bad_rows(tmp_path: Path) -> None:
    def make(i: int) -> Row:
        other = [user("another question"), assistant("bad")] if i == 7 else [user(f"Q {i}"), assistant("bad")]
        return {"chosen": [user(f"Q {i}"), assistant(" bad" if i == 3 else "good")], "rejected": other}

    report = check(write_rows(tmp_path / "rows.jsonl", rows(make)))
    assert [(row.row, row.problems[0].reason) for row in report.bad_rows] == [
        (4, "equal answers"),
        (8, "malformed messages"),
    ]


@pytest.mark.parametrize("learned", [True, False])
def test_a_known_task_takes_only_what_it_learns(learned: bool, tmp_path: Path) -> None:
    task = TaskSchema(name="t", format="completion", learns_preferences=learned)
    answers = rows(lambda i: {"prompt": f"Q {i}", "completion": f"A {i}"})
    pairs = rows(lambda i: {"prompt": f"Q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"})
    with pytest.raises(DataValidationError, match="learns preferences" if learned else "holds preference rows"):
        check(write_rows(tmp_path / "wrong.jsonl", answers if learned else pairs), task)
    assert check(write_rows(tmp_path / "right.jsonl", pairs if learned else answers), task).manifest.num_rejected == 0


# --- keys and columns


@pytest.mark.parametrize("header", [",body,team", "body,team,"])
def test_a_column_without_a_name_means_nothing(header: str, tmp_path: Path) -> None:
    """The index of a table is written so by pandas, and a trailing comma by Excel."""
    cells = [(str(n), f"text {n}", "ab"[n % 2]) for n in range(NUM_ROWS)]
    lines = [",".join(row if header.startswith(",") else (*row[1:], "")) for row in cells]
    (tmp_path / "a.csv").write_text("\n".join([header, *lines]) + "\n")
    report = check(tmp_path / "a.csv", TaskSchema(name="t", columns={"text": "body", "label": "team"}), DataConfig())
    assert report.refusal is None and report.manifest.task.labels == ("a", "b")


@pytest.mark.parametrize(
    ("first", "late", "is_refused"),
    [
        ({"text": "x", "label": "a"}, {"split": "test"}, True),
        ({"question": "x", "answer": "a"}, {"context": "because"}, True),
        ({"instruction": "x", "output": "a"}, {"input": "because"}, True),
        ({"messages": [user("x"), assistant("a")]}, {"tools": []}, True),
        ({"text": "x", "label": "a"}, {"context": "metadata"}, False),
    ],
)
def test_a_key_that_only_later_rows_have_is_refused_not_left_out(
    first: Row, late: Row, is_refused: bool, tmp_path: Path
) -> None:
    source, (key,) = write_rows(tmp_path / "a.jsonl", [*[first] * 1000, {**first, **late}]), late
    if not is_refused:
        assert check(source).manifest.num_read == 1001
        return
    with pytest.raises(DataValidationError, match=rf"a\.jsonl: row 1001 has the key {key}"):
        check(source)


@pytest.mark.parametrize("weights", [(0, 1), (1, 0)])
def test_an_answer_of_weight_0_is_not_learned(weights: tuple[int, int], tmp_path: Path) -> None:
    first, last = (assistant(text, weight=weight) for text, weight in zip("ab", weights, strict=True))
    source = write_rows(tmp_path / "a.jsonl", rows(lambda i: {"messages": [user(f"x {i}"), first, user("y"), last]}))
    num_bad = {}
    for turns in ("all", "last"):
        task = TaskSchema(name="t", format="chat", assistant_turns=turns)  # type: ignore[arg-type]
        num_bad[turns] = check(source, task).manifest.problems.get("malformed messages", 0)
    assert num_bad == {"all": NUM_ROWS, "last": NUM_ROWS if weights[1] == 0 else 0}, "an earlier turn is context"
