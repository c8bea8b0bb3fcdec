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
from deal_core.data.dataset import ArrivalRefusedError, Landing, build_dataset, validate_file
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import DataValidationError

datasets.disable_progress_bars()
AUTO = TaskSchema(name="t", format="auto")
LENIENT = DataConfig(max_bad_share=1.0)
NUM_ROWS = 40
Rows = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def rows(make: Callable[[int], dict[str, Any]]) -> Rows:
    return [make(number) for number in range(NUM_ROWS)]


def pandas_lines(content: Rows, path: Path) -> None:
    pd.DataFrame(content).to_json(path, orient="records", lines=True)


def pandas_list(content: Rows, path: Path) -> None:
    pd.DataFrame(content).to_json(path, orient="records", indent=2)


def pandas_csv(content: Rows, path: Path) -> None:
    pd.DataFrame(content).to_csv(path, index=False)


def pandas_columns(content: Rows, path: Path) -> None:
    pd.DataFrame(content).to_json(path)


def datasets_lines(content: Rows, path: Path) -> None:
    datasets.Dataset.from_list(content).to_json(path)


def datasets_parquet(content: Rows, path: Path) -> None:
    datasets.Dataset.from_list(content).to_parquet(path)


def arrow_parquet(content: Rows, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(content), path)


def class_labels(content: Rows, path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["World news", "Sport"])}
    )
    datasets.Dataset.from_list(content, features=features).to_parquet(path)


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
STORED_CALL = {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def tool_chat(number: int) -> dict[str, Any]:
    return {
        "messages": [
            user(f"Weather {number}?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "c1", "content": f"rain {number}"},
            assistant(f"It rains {number}."),
        ],
        "tools": [TOOL],
    }


def stored_tool_chat(number: int) -> str:
    call = assistant("", tool_calls=[STORED_CALL])
    result = {"role": "tool", "content": f"rain {number}", "tool_call_id": "c1"}
    return json.dumps([{**user(f"Weather {number}?"), "tools": [TOOL]}, call, result])


class Shape(NamedTuple):
    """A file, and what becomes of it."""

    make: Callable[[int], dict[str, Any]]
    write: Callable[[Rows, Path], None]
    file: str
    told: str
    """Words of the recognised shape, or of the refusal."""
    stored: Callable[[int], tuple[str, ...]] | None = None
    """Input and output of a row, and its worse answer if it is a preference; None: the file is refused."""


SHAPES = {
    "Alpaca": Shape(
        lambda i: {"instruction": f"Translate {i}.", "input": f"Wort {i}" if i % 2 else "", "output": f"word {i}"},
        pandas_list,
        "rows.json",
        "Alpaca rows (instruction with input under it, output)",
        lambda i: (f"Translate {i}.\nWort {i}" if i % 2 else f"Translate {i}.", f"word {i}"),
    ),
    "ShareGPT": Shape(
        lambda i: {
            "id": str(i),
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": f"Hi {i}"},
                {"from": "gpt", "value": f"Hello {i}"},
            ],
        },
        datasets_parquet,
        "rows.parquet",
        "ShareGPT chats (conversations)",
        lambda i: (json.dumps([{"role": "system", "content": "Be brief."}, user(f"Hi {i}")]), f"Hello {i}"),
    ),
    "OpenAI messages": Shape(
        lambda i: {"messages": [user(f"Hi {i}"), assistant(f"Hello {i}")]},
        datasets_lines,
        "rows.jsonl",
        "chats (messages)",
        lambda i: (json.dumps([user(f"Hi {i}")]), f"Hello {i}"),
    ),
    "OpenAI messages with tool calls in Parquet": Shape(
        tool_chat,
        arrow_parquet,
        "rows.parquet",
        "chats with tools (messages)",
        lambda i: (stored_tool_chat(i), f"It rains {i}."),
    ),
    "TRL conversational": Shape(
        lambda i: {"prompt": [user(f"Hi {i}")], "completion": [assistant(f"Hello {i}")]},
        datasets_parquet,
        "rows.parquet",
        "chats in two columns (prompt, completion)",
        lambda i: (json.dumps([user(f"Hi {i}")]), f"Hello {i}"),
    ),
    "ClassLabel": Shape(
        lambda i: {"text": f"Text {i}", "label": i % 2},
        class_labels,
        "rows.parquet",
        "ClassLabel names the labels",
        lambda i: (f"Text {i}", ("World news", "Sport")[i % 2]),
    ),
    "preference, explicit prompt": Shape(
        lambda i: {"prompt": f"Q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
        datasets_parquet,
        "rows.parquet",
        "preferences (prompt, chosen over rejected)",
        lambda i: (f"Q {i}", f"good {i}", f"bad {i}"),
    ),
    "preference, conversational": Shape(
        lambda i: {"prompt": [user(f"Q {i}")], "chosen": [assistant("good")], "rejected": [assistant(f"bad {i}")]},
        datasets_parquet,
        "rows.parquet",
        "preferences of chats (prompt, chosen over rejected)",
        lambda i: (json.dumps([user(f"Q {i}")]), "good", f"bad {i}"),
    ),
    "preference, implicit prompt in Parquet": Shape(
        lambda i: {"chosen": [user(f"Q {i}"), assistant("good")], "rejected": [user(f"Q {i}"), assistant("bad")]},
        datasets_parquet,
        "rows.parquet",
        "preferences of chats (chosen over rejected)",
        lambda i: (json.dumps([user(f"Q {i}")]), "good", "bad"),
    ),
    "preference, whole chats in Parquet, and the prompt once more": Shape(
        lambda i: {
            "prompt": f"Q {i}",
            "chosen": [user(f"Q {i}"), assistant("good")],
            "rejected": [user(f"Q {i}"), assistant("bad")],
        },
        datasets_parquet,
        "rows.parquet",
        "preferences of chats (chosen over rejected)",
        lambda i: (json.dumps([user(f"Q {i}")]), "good", "bad"),
    ),
    "preference, without a prompt": Shape(
        lambda i: {"chosen": f"Human: {i} Assistant: good", "rejected": f"Human: {i} Assistant: bad"},
        datasets_lines,
        "rows.jsonl",
        "A file of preferences has a prompt in each row, or whole chats",
    ),
    "preference, unpaired": Shape(
        lambda i: {"prompt": f"Q {i}", "completion": f"answer {i}", "label": bool(i % 2)},
        datasets_parquet,
        "rows.parquet",
        "rated answers.*Keep the rows whose label is true",
    ),
    "plain text": Shape(
        lambda i: {"text": f"Some long text {i}"},
        datasets_parquet,
        "rows.parquet",
        r"continued pre-training.*prompt and completion in place of text",
    ),
    "plain text among other columns": Shape(
        lambda i: {"id": i, "url": "x", "text": f"Some long text {i}"},
        datasets_lines,
        "rows.jsonl",
        r"name them, for example with --set task.columns.*continued pre-training.* cannot be learned",
    ),
    "SQuAD in JSON lines": Shape(
        lambda i: {"context": "c", "question": f"Who? {i}", "answers": {"text": ["He", "Him"], "answer_start": [0, 1]}},
        datasets_lines,
        "rows.jsonl",
        "completions (question with context under it, answers)",
        lambda i: (f"Who? {i}\nc", "He"),
    ),
    "answers in a list": Shape(
        lambda i: {"question": f"Who? {i}", "answers": [f"He {i}", "Him"]},
        arrow_parquet,
        "rows.parquet",
        "completions (question, answers)",
        lambda i: (f"Who? {i}", f"He {i}"),
    ),
    "chat whose answer is a list": Shape(
        lambda i: {"messages": [user(f"Hi {i}"), {"role": "assistant", "content": [f"Hello {i}", "Hey"]}]},
        pandas_lines,
        "rows.jsonl",
        "chats (messages)",
        lambda i: (json.dumps([user(f"Hi {i}")]), f"Hello {i}"),
    ),
    "several labels": Shape(
        lambda i: {"text": f"Text {i}", "label": [i % 2, 2]},
        datasets_parquet,
        "rows.parquet",
        "label is a list, not a text",
    ),
    "CSV with whole numbers for labels": Shape(
        lambda i: {"text": f"Text {i}", "label": i % 2},
        pandas_csv,
        "rows.csv",
        r'labels: \{"0": NAME, "1": NAME\}',
    ),
    "pandas by columns": Shape(
        lambda i: {"text": f"Text {i}", "label": "a"},
        pandas_columns,
        "rows.json",
        r'orient="records", lines=True',
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_of_a_common_shape_is_learned_rightly_or_refused_with_a_remedy(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    source = tmp_path / shape.file
    shape.write(rows(shape.make), source)
    landing = Landing(
        sources=files_at(source), task=TaskSchema(name="t", format="auto", assistant_turns="all"), config=DataConfig()
    )
    if shape.stored is None:
        with pytest.raises(DataValidationError, match=f"(?s){shape.told}"):
            build_dataset(landing, tmp_path / "dataset")
        return
    assert shape.told in validate_file(landing).shape
    manifest = build_dataset(landing, tmp_path / "dataset")
    assert (manifest.num_read, manifest.num_rejected) == (NUM_ROWS, 0)
    assert stored_rows(tmp_path) == sorted(shape.stored(number) for number in range(NUM_ROWS))


def stored_rows(folder: Path) -> list[tuple[str, ...]]:
    tables = [pq.read_table(folder / "dataset" / f"{split}.parquet") for split in ("train", "test")]
    names = ("input", "output", "rejected")
    return sorted(tuple(row[name] for name in names if name in row) for table in tables for row in table.to_pylist())


def build(content: Rows, path: Path, task: TaskSchema) -> list[tuple[str, ...]]:
    """Rows of the dataset of a file that pandas writes."""
    (pandas_csv if path.suffix == ".csv" else pandas_lines)(content, path)
    build_dataset(Landing(sources=files_at(path), task=task, config=LENIENT), path.parent / "dataset")
    return stored_rows(path.parent)


# --- remedies that the messages name


def test_the_chosen_answers_alone_are_learned_if_they_are_named(tmp_path: Path) -> None:
    pairs = rows(lambda i: {"prompt": f"Q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"})
    task = TaskSchema(name="t", format="auto", columns={"completion": "chosen"})
    assert build(pairs, tmp_path / "a.jsonl", task) == sorted((f"Q {i}", f"good {i}") for i in range(NUM_ROWS))
    chats = rows(lambda i: {"chosen": [user(f"Q {i}"), assistant("good")], "rejected": [user(f"Q {i}")]})
    task = TaskSchema(name="t", format="auto", columns={"messages": "chosen"})
    assert len(build(chats, tmp_path / "b.jsonl", task)) == NUM_ROWS


def test_numbers_for_labels_are_learned_once_they_are_named_or_listed(tmp_path: Path) -> None:
    numbers = rows(lambda i: {"text": f"Text {i}", "label": i % 2})
    named = TaskSchema(name="t", labels=("bad", "good"), label_names={"0": "bad", "1": "good"})
    wanted = sorted((f"Text {i}", ("bad", "good")[i % 2]) for i in range(NUM_ROWS))
    assert build(numbers, tmp_path / "rows.csv", named) == wanted
    listed = TaskSchema(name="t", labels=("0", "1"))
    assert build(numbers, tmp_path / "rows.csv", listed) == sorted((f"Text {i}", str(i % 2)) for i in range(NUM_ROWS))


def test_whole_numbers_that_a_gap_made_floats_are_the_same_labels(tmp_path: Path) -> None:
    """An int column with gaps, written by pandas, has 0.0 and 1.0."""
    content = [{"text": f"Text {i}", "label": None if i == 5 else i % 2} for i in range(NUM_ROWS)]
    task = TaskSchema(name="t", labels=("bad", "good"), label_names={"0": "bad", "1": "good"})
    pd.DataFrame(content).to_csv(tmp_path / "rows.csv", index=False)
    assert "0.0" in (tmp_path / "rows.csv").read_text()
    manifest = build_dataset(
        Landing(sources=files_at(tmp_path / "rows.csv"), task=task, config=LENIENT), tmp_path / "dataset"
    )
    assert manifest.num_rejected == 1, "the gap"
    wanted = sorted((f"Text {i}", ("bad", "good")[i % 2]) for i in range(NUM_ROWS) if i != 5)
    assert stored_rows(tmp_path) == wanted


def test_numbers_are_never_taken_for_places_in_the_list_of_labels(tmp_path: Path) -> None:
    pandas_csv(rows(lambda i: {"text": f"Text {i}", "label": 1 + i % 2}), tmp_path / "rows.csv")
    landing = Landing(
        sources=files_at(tmp_path / "rows.csv"), task=TaskSchema(name="t", labels=("a", "b")), config=DataConfig()
    )
    with pytest.raises(ArrivalRefusedError, match=r"outside the task's set: a whole number; name it in the spec"):
        build_dataset(landing, tmp_path / "dataset")


def test_class_labels_fit_a_task_that_learned_their_numbers_or_their_names(tmp_path: Path) -> None:
    class_labels(rows(lambda i: {"text": f"Text {i}", "label": i % 2}), tmp_path / "rows.parquet")
    for labels in (("0", "1"), ("sport", "World News"), ()):
        task = TaskSchema(name="t", labels=labels)
        manifest = build_dataset(
            Landing(sources=files_at(tmp_path / "rows.parquet"), task=task, config=LENIENT), tmp_path / "dataset"
        )
        assert manifest.num_rejected == 0
        assert {output for _, output in stored_rows(tmp_path)} == set(labels or ("World news", "Sport"))


def test_a_class_without_a_name_is_a_bad_row(tmp_path: Path) -> None:
    content = rows(lambda i: {"text": f"Text {i}", "label": i % 2 if i else -1})  # -1: no label, as datasets has it
    class_labels(content, tmp_path / "rows.parquet")
    task = TaskSchema(name="t", format="auto")
    report = validate_file(Landing(sources=files_at(tmp_path / "rows.parquet"), task=task, config=LENIENT))
    assert dict(report.manifest.problems) == {"label outside the task's set": 1}


@pytest.mark.parametrize(
    "metadata", [b"", b"[]", b"{}", b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}', b"\xff"]
)
def test_metadata_of_another_form_name_no_labels(metadata: bytes, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": ["x", "y"]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "rows.parquet")
    report = validate_file(
        Landing(sources=files_at(tmp_path / "rows.parquet"), task=TaskSchema(name="t", format="auto"), config=LENIENT)
    )
    assert set(report.manifest.task.labels) == {"x", "y"}


# --- several right answers


def test_test_rows_keep_every_right_answer_and_training_rows_the_first(tmp_path: Path) -> None:
    """Also if the first list comes late in the file, after rows that are written already."""
    monkeys = ["ape", "monkey", "ape"]
    content = rows(lambda i: {"prompt": f"Q {i}", "completion": monkeys if i > 30 else f"A {i}"})
    pandas_lines(content, tmp_path / "rows.jsonl")
    landing = Landing(
        sources=files_at(tmp_path / "rows.jsonl"), task=TaskSchema(name="t", format="auto"), config=LENIENT
    )
    assert validate_file(landing).num_several == 9
    build_dataset(landing, tmp_path / "dataset")
    train, test = (pq.read_table(tmp_path / "dataset" / f"{split}.parquet") for split in ("train", "test"))
    assert train.column_names == ["input", "output", "sha256"]
    found = {row["input"]: row["references"] for row in test.to_pylist()}
    wanted = {f"Q {i}": ["ape", "monkey"] if i > 30 else None for i in range(NUM_ROWS)}
    assert found == {text: wanted[text] for text in found}
    assert {str(each) for each in found.values()} == {"None", "['ape', 'monkey']"}


def test_a_list_of_one_answer_is_the_same_row_as_the_answer(tmp_path: Path) -> None:
    digests = []
    for completion in ("A", ["A"], ["A", "A"]):
        content = rows(lambda i, answer=completion: {"prompt": f"Q {i}", "completion": answer})  # type: ignore[misc]
        pandas_lines(content, tmp_path / "rows.jsonl")
        landing = Landing(
            sources=files_at(tmp_path / "rows.jsonl"), task=TaskSchema(name="t", format="auto"), config=LENIENT
        )
        digests.append(build_dataset(landing, tmp_path / "dataset").sha256)
        references = pq.read_table(tmp_path / "dataset/test.parquet")["references"]
        assert references.null_count == len(references)
    assert len(set(digests)) == 1
    pandas_lines(rows(lambda i: {"prompt": f"Q {i}", "completion": ["A", "B"]}), tmp_path / "rows.jsonl")
    assert build_dataset(landing, tmp_path / "dataset").sha256 not in digests, "other right answers are other test rows"


def test_rows_without_an_answer_or_with_a_bad_one_are_bad_rows(tmp_path: Path) -> None:
    bad = {0: [], 1: ["A", " "], 2: ["A", "b" * 30_000], 3: [1, 2], 4: {"text": []}, 5: ["A", "\u0000"]}
    content = rows(lambda i: {"prompt": f"Q {i}", "completion": bad.get(i, "A")})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    landing = Landing(
        sources=files_at(tmp_path / "rows.jsonl"), task=TaskSchema(name="t", format="auto"), config=LENIENT
    )
    report = validate_file(landing)
    assert [bad.row for bad in report.bad_rows] == [1, 2, 3, 4, 5, 6]
    assert [bad.problems[0].why for bad in report.bad_rows] == [
        "completion has no answer",
        "completion is empty",
        "completion has 30000 characters, allowed are 20000",
        "completion is a list, not a text",
        "completion has no answer",
        "completion has a byte that is not UTF-8, or a NUL",
    ]
    chats = rows(lambda i: {"messages": [user(f"Hi {i}"), {"role": "assistant", "content": ["A", ""]}]})
    pandas_lines(chats, tmp_path / "rows.jsonl")
    assert dict(validate_file(landing).manifest.problems) == {"empty text": NUM_ROWS}


# --- what stays as it was


def test_a_prompt_that_the_task_names_has_no_context(tmp_path: Path) -> None:
    content = rows(lambda i: {"instruction": f"Do {i}", "context": "more", "output": f"done {i}"})
    task = TaskSchema(name="t", format="auto", columns={"prompt": "instruction"})
    assert build(content, tmp_path / "rows.jsonl", task) == sorted((f"Do {i}", f"done {i}") for i in range(NUM_ROWS))


def test_a_known_task_joins_a_context_as_a_new_one(tmp_path: Path) -> None:
    content = rows(lambda i: {"question": f"Who {i}?", "context": "Ada", "answer": f"a{i}"})
    task = TaskSchema(name="t", format="completion")
    found = build(content, tmp_path / "rows.jsonl", task)
    assert found == sorted((f"Who {i}?\nAda", f"a{i}") for i in range(NUM_ROWS))


def test_preference_columns_beside_a_complete_row_are_not_read(tmp_path: Path) -> None:
    content = rows(lambda i: {"prompt": f"Q {i}", "completion": f"A {i}", "chosen": "x", "rejected": "y"})
    found = build(content, tmp_path / "rows.jsonl", TaskSchema(name="t", format="auto"))
    assert found == sorted((f"Q {i}", f"A {i}") for i in range(NUM_ROWS))


def test_preferences_are_found_by_named_columns_beside_other_answers(tmp_path: Path) -> None:
    content = rows(lambda i: {"prompt": f"Q {i}", "completion": f"A {i}", "good": f"x {i}", "bad": f"y {i}"})
    task = TaskSchema(name="t", format="auto", metric="auto", columns={"chosen": "good", "rejected": "bad"})
    found = build(content, tmp_path / "rows.jsonl", task)
    assert found == sorted((f"Q {i}", f"x {i}", f"y {i}") for i in range(NUM_ROWS))
    manifest = json.loads((tmp_path / "dataset" / "manifest.json").read_text())
    assert (manifest["task"]["metric"], manifest["task"]["learns_preferences"]) == ("preference", True)


def test_pairs_that_teach_nothing_are_bad_rows(tmp_path: Path) -> None:
    def make(i: int) -> dict[str, Any]:
        other = [user("another question"), assistant("bad")] if i == 7 else [user(f"Q {i}"), assistant("bad")]
        return {"chosen": [user(f"Q {i}"), assistant("bad" if i == 3 else "good")], "rejected": other}

    pandas_lines(rows(make), tmp_path / "rows.jsonl")
    task = TaskSchema(name="t", format="auto")
    report = validate_file(Landing(sources=files_at(tmp_path / "rows.jsonl"), task=task, config=LENIENT))
    assert [(bad.row, bad.problems[0].why) for bad in report.bad_rows] == [
        (4, "both answers are the same"),
        (8, "chosen and rejected differ before their last message"),
    ]


def test_one_question_may_have_several_pairs_of_answers(tmp_path: Path) -> None:
    content = rows(lambda i: {"prompt": f"Q {i // 4}", "chosen": "good", "rejected": f"bad {i % 2}"})
    found = build(content, tmp_path / "rows.jsonl", TaskSchema(name="t", format="auto"))
    assert found == sorted({(f"Q {i // 4}", "good", f"bad {i % 2}") for i in range(NUM_ROWS)})


@pytest.mark.parametrize("learned", [True, False])
def test_a_known_task_takes_only_what_it_learns(learned: bool, tmp_path: Path) -> None:
    task = TaskSchema(name="t", format="completion", learns_preferences=learned)
    answers = rows(lambda i: {"prompt": f"Q {i}", "completion": f"A {i}"})
    pairs = rows(lambda i: {"prompt": f"Q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"})
    with pytest.raises(DataValidationError, match="learns preferences" if learned else "holds preference rows"):
        build(answers if learned else pairs, tmp_path / "wrong.jsonl", task)
    assert len(build(pairs if learned else answers, tmp_path / "right.jsonl", task)) == NUM_ROWS


def checked(content: str, path: Path, task: TaskSchema, **landing: Any) -> Any:
    path.write_text(content)
    return validate_file(Landing(sources=files_at(path), task=task, config=DataConfig(), **landing))


@pytest.mark.parametrize("header", [",body,team", "body,team,"])
def test_a_column_without_a_name_means_nothing(header: str, tmp_path: Path) -> None:
    """The index of a table is written so by pandas, and a trailing comma by Excel."""
    cells = [(str(n), f"text {n}", "ab"[n % 2]) for n in range(NUM_ROWS)]
    lines = [",".join(row if header.startswith(",") else (*row[1:], "")) for row in cells]
    task = TaskSchema(name="t", columns={"text": "body", "label": "team"})
    report = checked("\n".join([header, *lines]) + "\n", tmp_path / "a.csv", task)
    assert report.refusal is None and report.manifest.task.labels == ("a", "b")


@pytest.mark.parametrize(
    ("task", "first", "late"),
    [
        (AUTO, {"text": "x", "label": "a"}, {"split": "test"}),
        (AUTO, {"question": "x", "answer": "a"}, {"context": "because"}),
        (AUTO, {"instruction": "x", "output": "a"}, {"input": "because"}),
        (AUTO, {"messages": [user("x"), assistant("a")]}, {"tools": []}),
    ],
)
def test_a_key_that_only_later_rows_have_is_refused_not_left_out(
    task: TaskSchema, first: dict[str, Any], late: dict[str, Any], tmp_path: Path
) -> None:
    lines = [json.dumps(first)] * 1000 + [json.dumps({**first, **late})]
    (key,) = late
    with pytest.raises(DataValidationError, match=f"row 1001 has the key {key}, which the first rows lack"):
        checked("\n".join(lines), tmp_path / "a.jsonl", task)


def test_a_key_of_metadata_may_come_late(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": f"x {n}", "label": "ab"[n % 2], **({"context": "c"} if n > 1000 else {})})
        for n in range(1002)
    ]
    assert checked("\n".join(lines), tmp_path / "a.jsonl", TaskSchema(name="t")).refusal is None


@pytest.mark.parametrize("weights", [(0, 1), (1, 0)])
def test_an_answer_of_weight_0_is_not_learned(weights: tuple[int, int], tmp_path: Path) -> None:
    def report(turns: str) -> Any:
        task = TaskSchema(name="t", format="chat", assistant_turns=turns)  # type: ignore[arg-type]
        chats = [
            [user(f"x {n}"), assistant("a", weight=weights[0]), user("y"), assistant(f"b {n}", weight=weights[1])]
            for n in range(NUM_ROWS)
        ]
        return checked("\n".join(json.dumps({"messages": chat}) for chat in chats), tmp_path / "a.jsonl", task)

    assert "weight 0" in str(report("all").refusal)
    assert ("weight 0" in str(report("last").refusal)) == (weights[1] == 0), "an earlier turn is context"
