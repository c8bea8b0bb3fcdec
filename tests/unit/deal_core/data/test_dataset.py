"""A file becomes a dataset: every bad row is named, no good row is lost, and the split is permanent."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError, Landing, build_dataset, validate_file
from deal_core.data.rows import MAX_EXAMPLES, row_digest, stored_input_digest
from deal_core.data.schema import ROW_SCHEMA, DatasetManifest, TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import DataValidationError
from tests.hypothesis_settings import SHARED_FIXTURES

TASK = TaskSchema(name="pets", labels=("Dog", "cat"))
LENIENT = DataConfig(max_bad_share=1.0)
GOOD = [{"text": f"text number {index}", "label": "Dog" if index % 2 else "cat"} for index in range(100)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON lines; a string or bytes goes in as the line itself."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def build(source: Path, task: TaskSchema = TASK, config: DataConfig = LENIENT, **options: Any) -> DatasetManifest:
    landing = Landing(sources=files_at(source), task=task, config=config, **options)
    return build_dataset(landing, source.parent / "dataset")


def rows_of(folder: Path, *splits: str) -> list[dict[str, str]]:
    paths = [folder / "dataset" / f"{split}.parquet" for split in splits or ("train", "test")]
    tables = [pq.read_table(path, columns=ROW_SCHEMA.names) for path in paths]
    assert all(table.schema == ROW_SCHEMA for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def quarantine_of(folder: Path) -> list[dict[str, Any]]:
    with (folder / "dataset" / "quarantine.jsonl").open(encoding="utf-8") as lines:  # a row may hold other line ends
        return [json.loads(line) for line in lines]


def test_good_rows_are_stored_and_counted(tmp_path: Path) -> None:
    manifest = build(write_jsonl(tmp_path / "pets.jsonl", GOOD))
    stored = rows_of(tmp_path)
    assert sorted((row["input"], row["output"]) for row in stored) == sorted((r["text"], r["label"]) for r in GOOD)
    assert manifest.num_train == len(rows_of(tmp_path, "train"))
    assert manifest.num_test == len(rows_of(tmp_path, "test"))
    assert (manifest.num_read, manifest.num_rejected, dict(manifest.problems), manifest.split) == (100, 0, {}, "hash")
    assert DatasetManifest.from_json(json.loads((tmp_path / "dataset" / "manifest.json").read_text())) == manifest
    assert manifest.source == "pets.jsonl"
    assert sorted(path.name for path in (tmp_path / "dataset").iterdir()) == [
        "manifest.json",
        "quarantine.jsonl",
        "test.parquet",
        "train.inputs",
        "train.parquet",
    ]
    inputs = [stored_input_digest("labelled", row["input"]) for row in rows_of(tmp_path, "train")]
    assert (tmp_path / "dataset" / "train.inputs").read_bytes() == b"".join(inputs)


LONG = "x" * 101
BAD_LINES: list[tuple[Any, str, str]] = [
    ({"label": "cat"}, "missing column", "text"),
    ({"text": "no label"}, "missing column", "label"),
    ({"text": " \t\n", "label": "cat"}, "empty text", "text is empty"),
    ({"text": None, "label": "cat"}, "empty text", "text is empty"),
    ({"text": "a", "label": "bird"}, "label outside the task's set", "bird"),
    ({"text": "a", "label": 7}, "label outside the task's set", "7"),
    ({"text": "a", "label": None}, "empty label", "label is empty"),
    ({"text": "a", "label": ["cat"]}, "malformed line", "label is a list, not a text"),
    ({"text": LONG, "label": "cat"}, "over-long text", "101 characters: xxxx"),
    (b'{"text": "caf\xe9 au lait", "label": "cat"}', "bad encoding", "caf\\udce9 au lait"),
    ({"text": "nul \x00 byte", "label": "cat"}, "bad encoding", "nul \\x00 byte"),
    ('{"text": "half \\ud83d pair", "label": "cat"}', "bad encoding", "half \\ud83d pair"),
    ('{"text": "cut', "malformed line", '{"text": "cut'),
    ({"text": "text  number\u00a05", "label": " DOG"}, "duplicate row", "text  number"),
]


def test_a_bad_row_is_named_with_its_number_reason_value_and_content(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pets.jsonl", [*GOOD, *(line for line, _, _ in BAD_LINES)])
    manifest = build(source, config=DataConfig(max_text_chars=100, max_bad_share=1.0))
    assert (manifest.num_read, manifest.num_rejected) == (100 + len(BAD_LINES), len(BAD_LINES))
    assert dict(manifest.problems) == Counter(reason for _, reason, _ in BAD_LINES)
    assert len(rows_of(tmp_path)) == 100
    entries = quarantine_of(tmp_path)
    for number, (entry, (line, reason, value)) in enumerate(zip(entries, BAD_LINES, strict=True), start=101):
        assert (entry["file"], entry["row"], entry["line"], entry["reason"]) == ("pets.jsonl", number, number, reason)
        assert value in entry["value"]
        if isinstance(line, dict):
            assert entry["raw"] == line


def test_bytes_that_are_not_utf8_can_be_had_back_from_quarantine(tmp_path: Path) -> None:
    build(write_jsonl(tmp_path / "pets.jsonl", [*GOOD, b'{"text": "caf\xe9 \\\\udce9", "label": "cat"}']))
    (entry,) = quarantine_of(tmp_path)
    assert entry["raw"]["text"].encode("utf-8", "surrogateescape") == b"caf\xe9 \\udce9"


def test_what_is_wrong_in_an_unused_column_costs_no_row(tmp_path: Path) -> None:
    rows = [*GOOD, b'{"text": "new", "label": "cat", "author": "Andr\xe9"}']
    assert build(write_jsonl(tmp_path / "pets.jsonl", rows)).num_rejected == 0


def test_labels_of_other_types_are_taken_as_text(tmp_path: Path) -> None:
    task = TaskSchema(name="t", labels=("0", "1", "true"))
    values = [0, 1, 1.0, "1", True]
    rows = [{"text": f"{kind} {index}", "label": value} for kind, value in enumerate(values) for index in range(9)]
    assert build(write_jsonl(tmp_path / "t.jsonl", rows), task).num_rejected == 0
    table = pa.table({"text": [f"t{i}" for i in range(20)], "label": pa.array([1.0, None, 1.0, float("nan")] * 5)})
    pq.write_table(table, tmp_path / "t.parquet")
    manifest = build(tmp_path / "t.parquet", task)
    assert dict(manifest.problems) == {"empty label": 10}
    assert {row["output"] for row in rows_of(tmp_path)} == {"1"}


def test_labels_are_taken_from_the_arrival_by_frequency_then_name(tmp_path: Path) -> None:
    labels = ["b"] * 10 + ["B"] * 4 + ["c"] * 20 + ["a "] * 14 + ["two\nlines"] * 3
    rows = [{"text": f"t{index}", "label": label} for index, label in enumerate(labels)]
    manifest = build(write_jsonl(tmp_path / "t.jsonl", rows), TaskSchema(name="t", format="auto"))
    assert manifest.task.labels == ("c", "a", "b", "two lines")
    assert manifest.task.format == "labelled"
    assert {row["output"] for row in rows_of(tmp_path)} == {"a", "b", "c", "two lines"}


def test_too_many_labels_are_an_error_that_names_some(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": f"free answer {index}"} for index in range(65)]
    source = write_jsonl(tmp_path / "t.jsonl", rows)
    for include_texts in (True, False):
        with pytest.raises(DataValidationError, match="more than 64 different labels") as refused:
            build(source, TaskSchema(name="t"), DataConfig(include_texts=include_texts))
        assert ("free answer 0" in str(refused.value)) is include_texts
    build(write_jsonl(source, rows[:64]), TaskSchema(name="t"))


@pytest.mark.parametrize("columns", [{}, {"text": "report"}])
def test_a_csv_without_a_header_is_refused_and_its_row_quoted_only_if_texts_may_be(
    tmp_path: Path, columns: dict[str, str]
) -> None:
    source = tmp_path / "may.csv"
    source.write_text('"Hi, I am Jane Doe, my card 4111 is lost",lost_card\nWhere is my card?,card_arrival\n')
    task = TaskSchema(name="t", columns=columns)
    with pytest.raises(DataValidationError) as refused:
        build(source, task, DataConfig())
    message = str(refused.value)
    assert message.startswith("may.csv has ") and "2 columns" in message
    assert "put the columns' names above it" in message and "deal check" in message
    assert "Jane" not in message and "lost_card" not in message
    with pytest.raises(DataValidationError, match=r"the columns 'Hi, I am Jane Doe.*', 'lost_card' .*above it"):
        build(source, task, DataConfig(include_texts=True))


@pytest.mark.parametrize("row", ['"I am Jane Doe, lost_card\n', '"I" am Jane Doe, lost_card\n'])
def test_a_header_that_cannot_be_read_is_told_by_its_line(tmp_path: Path, row: str) -> None:
    source = tmp_path / "may.csv"
    source.write_text(f"\n{row}Where is my card?,card_arrival\n")
    with pytest.raises(DataValidationError, match=r"may\.csv does not begin with a line .*\(line 2: ") as refused:
        build(source, TaskSchema(name="t"), DataConfig())
    assert "Jane" not in str(refused.value)


def test_good_test_rows_do_not_make_up_for_bad_training_rows(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pets.jsonl", [*[{"text": "", "label": "cat"}] * 5, *GOOD[:5]])
    tests = write_jsonl(tmp_path / "tests.jsonl", GOOD[10:])
    with pytest.raises(ArrivalRefusedError, match=r"^pets\.jsonl: 5 of 10 rows cannot be used \(50\.0%, allowed"):
        build(source, config=DataConfig(max_bad_share=0.2), test_sources=files_at(tests))


def test_an_arrival_is_refused_beyond_the_share_of_bad_rows_and_not_at_it(tmp_path: Path) -> None:
    bad = [{"text": "", "label": "cat"}] * 25
    source = write_jsonl(tmp_path / "pets.jsonl", [*bad, *GOOD])
    assert build(source, config=DataConfig(max_bad_share=0.2)).num_rejected == 25
    with pytest.raises(ArrivalRefusedError) as refused:
        build(source, config=DataConfig(max_bad_share=0.19))
    message = str(refused.value)
    assert message.startswith(
        "pets.jsonl: 25 of 125 rows cannot be used (20.0%, allowed are 19.0%): 25 × empty text. The first: row 1 "
    )
    assert "\n" not in message and "quarantine.jsonl" in message and len(message) < 800
    assert len(refused.value.report.bad_rows) == MAX_EXAMPLES
    assert refused.value.report.manifest.num_rejected == 25
    assert len(quarantine_of(tmp_path)) == 25
    assert [path.name for path in (tmp_path / "dataset").iterdir()] == ["quarantine.jsonl"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "pets.jsonl has no rows"),
        (["", "  "], "pets.jsonl has no rows"),
        ([{"text": "a", "label": "cat", "split": "test"}], "no row to train on"),
        ([{"text": "a", "label": "cat", "split": "train"}], "no row to test with"),
        (["broken"] * 3, "3 of 3 rows cannot be used"),
    ],
)
def test_an_arrival_that_cannot_be_learned_is_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    config = DataConfig()
    with pytest.raises(ArrivalRefusedError, match=message):
        build(write_jsonl(tmp_path / "pets.jsonl", rows), config=config)
    assert (
        validate_file(Landing(sources=files_at(tmp_path / "pets.jsonl"), task=TASK, config=config)).refusal is not None
    )


def test_a_file_that_was_cut_off_keeps_its_bad_rows_and_makes_no_dataset(tmp_path: Path) -> None:
    source = tmp_path / "pets.jsonl.gz"
    content = "".join(json.dumps(row) + "\n" for row in [{"text": "", "label": "cat"}, *GOOD * 200])
    source.write_bytes(gzip.compress(content.encode())[:-100])
    with pytest.raises(DataValidationError, match="cut off"):
        build(source)
    assert quarantine_of(tmp_path)[0]["row"] == 1
    assert [path.name for path in (tmp_path / "dataset").iterdir()] == ["quarantine.jsonl"]


def test_a_refused_arrival_leaves_no_earlier_dataset_behind(tmp_path: Path) -> None:
    build(write_jsonl(tmp_path / "pets.jsonl", GOOD))
    with pytest.raises(ArrivalRefusedError):
        build(write_jsonl(tmp_path / "pets.jsonl", []))
    assert not (tmp_path / "dataset" / "manifest.json").exists()


# --- split


def frozen_of(tmp_path: Path) -> list[bytes]:
    """Digests of the frozen texts: the test rows of the dataset just built."""
    return [stored_input_digest("labelled", row["input"]) for row in rows_of(tmp_path, "test")]


def test_frozen_texts_stay_test_rows_and_others_are_learned(tmp_path: Path) -> None:
    build(write_jsonl(tmp_path / "pets.jsonl", GOOD))
    first, frozen = {row["sha256"] for row in rows_of(tmp_path, "test")}, frozen_of(tmp_path)
    assert 8 <= len(first) <= 35
    variants = [
        {"text": f"  {row['text'].replace(' ', '  ')}\r\n", "label": row["label"].upper()} for row in GOOD[::-1]
    ]
    more = [{"text": f"another {index}", "label": "cat"} for index in range(100)]
    manifest = build(write_jsonl(tmp_path / "pets.jsonl", [*more, *variants]), frozen_test_inputs=frozen)
    assert (manifest.num_rejected, manifest.num_train) == (0, 200 - len(first))
    assert first == {row["sha256"] for row in rows_of(tmp_path, "test")}
    assert not first & {row["sha256"] for row in rows_of(tmp_path, "train")}


def test_a_text_lies_on_one_side_of_the_split_whatever_its_answers(tmp_path: Path) -> None:
    build(write_jsonl(tmp_path / "pets.jsonl", [{**row, "label": label} for row in GOOD for label in ("cat", "dog")]))
    texts = [{row["input"] for row in rows_of(tmp_path, split)} for split in ("train", "test")]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == len(GOOD)


def test_the_rule_of_the_split_is_written_in_the_text(tmp_path: Path) -> None:
    build(write_jsonl(tmp_path / "pets.jsonl", GOOD))
    smallest = sorted(row_digest(row["text"]) for row in GOOD)[:30]
    for split in ("train", "test"):
        for row in rows_of(tmp_path, split):
            assert row["sha256"] == row_digest(row["input"], row["output"].casefold()).hex()
            assert (row_digest(row["input"]) in smallest) == (split == "test")


@pytest.mark.parametrize(("num_rows", "num_test"), [(2, 0), (3, 1), (89, 29), (90, 30), (600, 120)])
def test_a_first_arrival_gives_a_fifth_and_at_least_thirty_or_a_third(
    tmp_path: Path, num_rows: int, num_test: int
) -> None:
    rows = [{"text": f"t{index}", "label": "cat"} for index in range(num_rows)]
    source = write_jsonl(tmp_path / "pets.jsonl", rows)
    if not num_test:
        with pytest.raises(ArrivalRefusedError, match="no row to test with"):
            build(source)
        return
    manifest = build(source)
    assert (manifest.num_train, manifest.num_test) == (num_rows - num_test, num_test)
    assert build(write_jsonl(tmp_path / "other.jsonl", rows[::-1])).sha256 == manifest.sha256
    half = build(source, config=DataConfig(test_share=0.5))
    assert half.num_test == pytest.approx(num_rows / 2, abs=0.5)


@pytest.mark.parametrize(("num_lacking", "num_added"), [(100, 14), (3, 3), (0, 0)])
def test_a_known_task_that_lacks_test_rows_gets_a_fifth_of_the_new_texts(
    tmp_path: Path, num_lacking: int, num_added: int
) -> None:
    rows = [{"text": f"t{index}", "label": "cat"} for index in range(100)]
    frozen, learned = ({row_digest(row["text"]) for row in part} for part in (rows[:10], rows[10:30]))
    known = {"frozen_test_inputs": frozen, "learned_inputs": learned, "num_lacking": num_lacking}
    manifest = build(write_jsonl(tmp_path / "pets.jsonl", rows), **known)
    assert (manifest.num_added, manifest.num_test, manifest.split) == (num_added, 10 + num_added, "hash")
    tests = {row_digest(row["input"]) for row in rows_of(tmp_path, "test")}
    assert tests > frozen or not num_added
    assert not tests & learned, "what the lineage has been trained on never tests it"
    new = sorted(row_digest(row["text"]) for row in rows[30:])
    assert tests - frozen == set(new[:num_added]), "by the digests, in any order of the rows"
    assert build(write_jsonl(tmp_path / "other.jsonl", rows[::-1]), **known).sha256 == manifest.sha256


def test_a_file_that_names_its_test_rows_and_a_renewal_add_none(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": "cat"} for index in range(100)]
    known = {"frozen_test_inputs": {row_digest(row["text"]) for row in rows[:10]}, "num_lacking": 50}
    split = [{**row, "split": "train" if index % 4 else "test"} for index, row in enumerate(rows)]
    assert build(write_jsonl(tmp_path / "split.jsonl", split), **known).num_added == 0
    renewed = build(write_jsonl(tmp_path / "pets.jsonl", rows), **known, renews_tests=True)
    assert (renewed.num_added, renewed.num_test) == (0, 30)


def test_a_split_column_wins_and_a_training_row_never_equals_a_test_row(tmp_path: Path) -> None:
    rows = [{**row, "split": "Test" if index >= 60 else "train"} for index, row in enumerate(GOOD)]
    leaks = [{**rows[70], "split": "train"}, {**rows[0], "split": "train"}, {**rows[99], "split": "test"}]
    bad = {"text": "x", "label": "cat", "split": "validation"}
    manifest = build(write_jsonl(tmp_path / "pets.jsonl", [leaks[0], *rows, *leaks[1:], bad]))
    assert (manifest.split, manifest.num_train, manifest.num_test) == ("given", 60, 40)
    assert [(entry["row"], entry["reason"]) for entry in quarantine_of(tmp_path)] == [
        (1, "text of a test row"),
        (102, "duplicate row"),
        (103, "duplicate row"),
        (104, "unknown split"),
    ]


def drawn(num_random: int) -> list[dict[str, Any]]:
    """The good rows; so many of them, at the end, were drawn at random."""
    return [{**row, "is_random": index >= len(GOOD) - num_random} for index, row in enumerate(GOOD)]


FROZEN = [row_digest("a text of the first arrival")]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_renewed_test_rows_are_those_drawn_at_random(tmp_path: Path, kind: str) -> None:
    source = tmp_path / f"pets.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(drawn(25)), source)
    else:
        {"jsonl": write_jsonl, "csv": write_csv}[kind](source, drawn(25))
    manifest = build(source, frozen_test_inputs=FROZEN, renews_tests=True)
    assert (manifest.split, manifest.num_train, manifest.num_test) == ("given", 75, 25)
    assert {row["input"] for row in rows_of(tmp_path, "test")} == {row["text"] for row in GOOD[75:]}


@pytest.mark.parametrize("num_random", [0, 9, 100])
def test_too_few_rows_drawn_at_random_or_nothing_else_leave_the_split_to_the_digests(
    tmp_path: Path, num_random: int
) -> None:
    plain = build(write_jsonl(tmp_path / "pets.jsonl", GOOD), frozen_test_inputs=FROZEN, renews_tests=True)
    manifest = build(
        write_jsonl(tmp_path / "pets.jsonl", drawn(num_random)), frozen_test_inputs=FROZEN, renews_tests=True
    )
    assert (manifest.split, manifest.sha256, manifest.num_rejected) == ("hash", plain.sha256, 0)
    assert 0 < manifest.num_test < 40


def test_rows_drawn_at_random_are_learned_if_no_test_rows_are_renewed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pets.jsonl", drawn(25))
    assert build(source, frozen_test_inputs=FROZEN).num_train == len(GOOD)
    assert build(source).split == "hash"
    named = [{**row, "split": "train" if index else "test"} for index, row in enumerate(drawn(25))]
    source = write_jsonl(tmp_path / "pets.jsonl", named)
    assert build(source, frozen_test_inputs=FROZEN, renews_tests=True).num_test == 1


def test_a_test_file_wins_over_a_split_column(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "pets.jsonl", [{**row, "split": "test"} for row in GOOD[:80]])
    test = write_csv(tmp_path / "held_out.csv", GOOD[78:])
    manifest = build(train, test_sources=files_at(test))
    assert (manifest.split, manifest.num_read, manifest.num_train, manifest.num_test) == ("given", 102, 78, 22)
    assert [(entry["file"], entry["row"], entry["reason"]) for entry in quarantine_of(tmp_path)] == [
        ("pets.jsonl", 79, "text of a test row"),
        ("pets.jsonl", 80, "text of a test row"),
    ]


@pytest.mark.parametrize("label", [GOOD[3]["label"], "cat" if GOOD[3]["label"] != "cat" else "dog"])
def test_a_training_row_with_the_text_of_a_frozen_test_row_is_bad(tmp_path: Path, label: str) -> None:
    frozen = [row_digest(GOOD[3]["text"])]
    rows = [{**row, "label": label if row == GOOD[3] else row["label"], "split": "train"} for row in GOOD]
    manifest = build(write_jsonl(tmp_path / "pets.jsonl", rows), frozen_test_inputs=frozen)
    assert dict(manifest.problems) == {"text of a test row": 1}
    assert quarantine_of(tmp_path)[0]["row"] == 4
    assert manifest.num_test == 0  # the frozen rows are there to test with


# --- identity


def test_a_dataset_is_the_same_whatever_its_order_format_and_file_name(tmp_path: Path) -> None:
    one = build(write_jsonl(tmp_path / "pets.jsonl", GOOD))
    shuffled = [{"Category": row["label"].upper(), "body": row["text"], "id": "7"} for row in GOOD[::-1]]
    two = build(write_csv(tmp_path / "other.csv", shuffled))
    pq.write_table(pa.Table.from_pylist(GOOD), tmp_path / "third.parquet")
    three = build(tmp_path / "third.parquet", TaskSchema(name="pets"))
    assert one.sha256 == two.sha256 == three.sha256


def test_a_dataset_is_another_with_another_row_task_or_split(tmp_path: Path) -> None:
    same = build(write_jsonl(tmp_path / "pets.jsonl", GOOD)).sha256
    others = [
        build(write_jsonl(tmp_path / "pets.jsonl", GOOD[1:])).sha256,
        build(write_jsonl(tmp_path / "pets.jsonl", [{**GOOD[0], "label": "Dog"}, *GOOD[1:]])).sha256,
        build(write_jsonl(tmp_path / "pets.jsonl", GOOD), TaskSchema(name="pets2", labels=TASK.labels)).sha256,
        build(write_jsonl(tmp_path / "pets.jsonl", GOOD), config=DataConfig(test_share=0.4)).sha256,
    ]
    assert len({same, *others}) == 5


def test_how_an_arrival_landed_does_not_hang_on_the_test_rows_that_the_lineage_knows(tmp_path: Path) -> None:
    frozen = [row_digest(row["text"]) for row in GOOD[::9]]
    halves = [{**row, "split": "test" if index >= 50 else "train"} for index, row in enumerate(GOOD)]
    moved = [{**halves[0], "split": "test"}, *halves[1:]]
    known: set[str | None] = set()
    for rows in (GOOD, halves, moved):
        source = write_jsonl(tmp_path / "pets.jsonl", rows)
        alone, after_others = build(source), build(source, frozen_test_inputs=frozen)
        assert alone.landed_sha256 == after_others.landed_sha256 and alone.sha256 != after_others.sha256
        known.add(alone.landed_sha256)
    assert len(known - {None}) == 3, "another split that the user gives is another arrival"
    train, test = write_jsonl(tmp_path / "a.jsonl", GOOD[:50]), write_jsonl(tmp_path / "b.jsonl", GOOD[50:])
    assert build(train, test_sources=files_at(test), frozen_test_inputs=frozen).landed_sha256 in known


def test_the_digest_of_a_dataset_stays(tmp_path: Path) -> None:
    halves = [{**row, "split": "test" if index >= 60 else "train"} for index, row in enumerate(GOOD)]
    found = [build(write_jsonl(tmp_path / "pets.jsonl", rows)).sha256[:16] for rows in (GOOD, halves)]
    assert found == ["668469162e89f26d", "ad3bdafce7fe0107"]


def test_the_same_arrival_again_is_the_same_dataset_against_its_own_test_rows(tmp_path: Path) -> None:
    for name, rows in (
        ("hash", GOOD),
        ("given", [{**r, "split": "test" if i % 3 else "train"} for i, r in enumerate(GOOD)]),
    ):
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        first = build(source)
        assert build(source, frozen_test_inputs=frozen_of(tmp_path)) == first


# --- other formats


def test_completions_keep_their_white_space(tmp_path: Path) -> None:
    rows = [{"prompt": f"def f{index}():\r\n", "completion": "    return 1\r\n"} for index in range(50)]
    manifest = build(write_jsonl(tmp_path / "code.jsonl", rows), TaskSchema(name="code", format="auto"))
    assert manifest.task.format == "completion"
    assert {row["output"] for row in rows_of(tmp_path)} == {"    return 1\n"}
    assert rows_of(tmp_path, "train")[0]["input"].endswith("():\n")


def conversation(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


CHATS = [
    conversation(
        ("system", "Be kind."),
        ("user", f"Hello {index}"),
        ("assistant", "Hi!"),
        ("user", "Bye"),
        ("assistant", f"Bye {index}"),
    )
    for index in range(40)
]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_chat_is_stored_as_its_earlier_messages_and_its_answer(tmp_path: Path, kind: str) -> None:
    source = tmp_path / f"chat.{kind}"
    if kind == "csv":
        write_csv(source, [{"messages": json.dumps(chat)} for chat in CHATS])
    else:
        pq.write_table(pa.table({"messages": CHATS}), source)
    build(source, TaskSchema(name="chat", format="auto"))
    stored = {row["output"]: json.loads(row["input"]) for row in rows_of(tmp_path)}
    assert stored == {f"Bye {index}": chat[:-1] for index, chat in enumerate(CHATS)}


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("a.jsonl", '{"text": "Jane", "text": "Doe", "label": "cat"}', "malformed line: a key occurs twice"),
        ("a.jsonl", '{"text": "Jane', "malformed line: Unterminated string starting at: line 1 column 10 (char 9)"),
        ("a.jsonl", '{"text": "Jane"}\n{"text": "a", "label": "cat"}', "missing column: label"),
        ("a.jsonl", '{"text": ["Jane"], "label": "cat"}', "malformed line: text is a list, not a text"),
        ("a.jsonl", '{"text": "' + "Jane" * 30 + '", "label": "cat"}', "over-long text: text has 120 characters"),
        ("a.jsonl", '{"text": "Jane", "label": "7"}', "label outside the task's set: a whole number; name it"),
        ("a.csv", "Jane,cat,x", "malformed line: 3 fields under 2 columns"),
    ],
)
def test_a_bad_row_says_why_where_texts_are_hidden(tmp_path: Path, file: str, content: str, why: str) -> None:
    source = tmp_path / file
    head = "text,label\n" if file.endswith("csv") else ""
    source.write_text(f"{head}{content}\n")
    with pytest.raises(ArrivalRefusedError) as refused:
        build(source, config=DataConfig(max_text_chars=100))
    assert f"row 1{' (line 2)' if head else ''} {why}" in str(refused.value)
    assert "Jane" not in str(refused.value)
    assert quarantine_of(tmp_path)[0]["why"] and "Jane" not in quarantine_of(tmp_path)[0]["why"]


# --- the checks alone


def test_validate_file_finds_the_same_and_writes_nothing_unasked(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pets.jsonl", [*GOOD, *(line for line, _, _ in BAD_LINES)])
    config = DataConfig(max_bad_share=1.0, max_text_chars=100)
    report = validate_file(Landing(sources=files_at(source), task=TASK, config=config))
    assert [path.name for path in tmp_path.iterdir()] == ["pets.jsonl"]
    assert report.refusal is None
    assert [bad.row for bad in report.bad_rows] == list(range(101, 101 + len(BAD_LINES)))
    built = build(source, config=config)
    assert built.test_sha256 == hashlib.sha256((tmp_path / "dataset" / "test.parquet").read_bytes()).hexdigest()
    assert replace(built, test_sha256=None) == report.manifest


LINES = st.one_of(
    st.sampled_from([line for line, _, _ in BAD_LINES]),
    st.fixed_dictionaries({"text": st.text(max_size=8), "label": st.sampled_from(["dog", "CAT", "bird", ""])}),
    st.sampled_from(GOOD),
)


@settings(SHARED_FIXTURES, max_examples=15)
@given(lines=st.lists(LINES, max_size=25))
def test_every_row_is_either_kept_or_in_quarantine(tmp_path: Path, lines: list[Any]) -> None:
    """For any file, the kept rows are exactly the distinct good rows."""
    manifest = build(write_jsonl(tmp_path / "pets.jsonl", [*GOOD, *lines]))
    kept, rejected = rows_of(tmp_path), quarantine_of(tmp_path)
    assert manifest.num_read == 100 + len(lines) == len(kept) + len(rejected)
    assert len({row["sha256"] for row in kept}) == len(kept)
    good = {
        (unicodedata.normalize("NFC", line["text"]).split()[0], line["label"].strip().casefold())
        for line in [*GOOD, *lines]
        if isinstance(line, dict) and isinstance(line.get("text"), str) and isinstance(line.get("label"), str)
        if line["text"].strip() and "\x00" not in line["text"] and line["label"].strip().casefold() in ("dog", "cat")
    }
    assert {(unicodedata.normalize("NFC", row["input"]).split()[0], row["output"].casefold()) for row in kept} == good
