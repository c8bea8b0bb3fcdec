"""A file becomes a dataset: every bad row is named, no good row is lost, and the split is permanent."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError
from deal_core.data.rows import MAX_EXAMPLES, row_digest
from deal_core.data.schema import ROW_SCHEMA, TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import DataValidationError
from tests.built import AUTO, LENIENT, build, check, quarantine_of, write_rows
from tests.hypothesis_settings import SHARED_FIXTURES

TASK = TaskSchema(name="pets", labels=("Dog", "cat"))
GOOD = [{"text": f"text number {index}", "label": "Dog" if index % 2 else "cat"} for index in range(100)]
TEXTS = [{"text": f"t{index}", "label": "cat"} for index in range(100)]


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return tmp_path / "pets.jsonl"


def halves(first_test: int, rows: list[dict[str, Any]] = GOOD) -> list[dict[str, Any]]:
    return [{**row, "split": "test" if index >= first_test else "train"} for index, row in enumerate(rows)]


def test_good_rows_are_stored_and_counted(pets: Path) -> None:
    unused = b'{"text": "new", "label": "cat", "author": "Andr\xe9"}'
    built = build(write_rows(pets, [*GOOD, unused]), TASK)
    wanted = [*((row["text"], row["label"]) for row in GOOD), ("new", "cat")]
    assert sorted((row["input"], row["output"]) for row in built.rows()) == sorted(wanted)
    found = built.manifest
    assert (found.num_read, found.num_rejected, dict(found.problems), found.split) == (101, 0, {}, "hash")
    assert found.source == "pets.jsonl" and pq.read_schema(built.folder / "train.parquet") == ROW_SCHEMA
    assert found.test_sha256 == hashlib.sha256((built.folder / "test.parquet").read_bytes()).hexdigest()


BAD_LINES: list[tuple[Any, str, str, str]] = [
    ({"label": "cat"}, "missing column", "text", "text"),
    ({"text": "no label"}, "missing column", "label", "label"),
    ({"text": " \t\n", "label": "cat"}, "empty text", "text is empty", "text is empty"),
    ({"text": None, "label": "cat"}, "empty text", "text is empty", "text is empty"),
    ({"text": "a", "label": "bird"}, "label outside the task's set", "bird", ""),
    ({"text": "a", "label": 7}, "label outside the task's set", "7", "a whole number; name it"),
    ({"text": "a", "label": None}, "empty label", "label is empty", "label is empty"),
    ({"text": "a", "label": ["cat"]}, "malformed line", "label is a list", "label is a list, not a text"),
    ({"text": "x" * 101, "label": "cat"}, "over-long text", "101 characters: xxxx", "text has 101 characters"),
    (b'{"text": "caf\xe9 au lait", "label": "cat"}', "bad encoding", "caf\\udce9 au lait", "text has a byte"),
    ({"text": "nul \x00 byte", "label": "cat"}, "bad encoding", "nul \\x00 byte", "text has a byte"),
    ('{"text": "half \\ud83d pair", "label": "cat"}', "bad encoding", "half \\ud83d pair", "text has a byte"),
    ('{"text": "cut', "malformed line", '{"text": "cut', "Unterminated string starting at: line 1 column 10 (char 9)"),
    ('{"text": "xx", "text": "yy"}', "malformed line", '{"text": "xx"', "a key occurs twice"),
    ({"text": "text  number\u00a05", "label": " DOG"}, "duplicate row", "text  number", ""),
]
"""A line, the reason why it is bad, what quarantine shows, and what may be shown where texts may not."""


def test_a_bad_row_is_named_with_its_number_reason_value_and_content(pets: Path) -> None:
    """The checks alone find the same, and leave nothing."""
    config = DataConfig(max_text_chars=100, max_bad_share=1.0)
    source = write_rows(pets, [*GOOD, {"text": "y" * 100, "label": "cat"}, *(line for line, *_ in BAD_LINES)])
    report = check(source, TASK, config)
    assert [*pets.parent.iterdir()] == [pets] and report.refusal is None
    built = build(source, TASK, config)
    assert replace(built.manifest, test_sha256=None) == report.manifest
    assert dict(built.manifest.problems) == Counter(reason for _, reason, _, _ in BAD_LINES)
    assert built.manifest.num_read == 101 + len(BAD_LINES) and len(built.rows()) == 101
    rows = zip(built.bad, report.bad_rows, BAD_LINES, strict=True)
    for number, (entry, bad, (line, reason, value, why)) in enumerate(rows, start=102):
        assert (entry["file"], entry["row"], entry["line"], entry["reason"]) == ("pets.jsonl", number, number, reason)
        assert value in entry["value"] and bad.row == number
        assert bad.describe(include_texts=False).startswith(f"row {number} {reason}{': ' if why else ''}{why}")
        assert entry["why"].startswith(why) and bool(entry["why"]) == bool(why)
        if isinstance(line, dict):
            assert entry["raw"] == line
        elif isinstance(line, bytes):
            assert entry["raw"]["text"].encode("utf-8", "surrogateescape") == b"caf\xe9 au lait", "as it was"


def test_a_bad_row_of_a_csv_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"Jane\nDoe",cat\nJane,cat,x\n')
    (bad,) = check(tmp_path / "a.csv", TASK).bad_rows
    assert bad.describe(include_texts=False) == "row 2 (line 4) malformed line: 3 fields under 2 columns"


def test_labels_of_other_types_are_taken_as_text(tmp_path: Path) -> None:
    task = TaskSchema(name="t", labels=("0", "1", "true"))
    values = [0, 1, 1.0, "1", True]
    rows = [{"text": f"{kind} {index}", "label": value} for kind, value in enumerate(values) for index in range(9)]
    assert build(write_rows(tmp_path / "t.jsonl", rows), task).manifest.num_rejected == 0
    table = pa.table({"text": [f"t{i}" for i in range(20)], "label": pa.array([1.0, None, 1.0, float("nan")] * 5)})
    pq.write_table(table, tmp_path / "t.parquet")
    built = build(tmp_path / "t.parquet", task)
    assert dict(built.manifest.problems) == {"empty label": 10}
    assert {row["output"] for row in built.rows()} == {"1"}


def test_labels_are_taken_from_the_arrival_by_frequency_then_name(pets: Path) -> None:
    labels = ["b"] * 10 + ["B"] * 4 + ["c"] * 20 + ["a "] * 14 + ["two\nlines"] * 3
    built = build(write_rows(pets, [{"text": f"t{index}", "label": label} for index, label in enumerate(labels)]))
    assert (built.manifest.task.format, built.manifest.task.labels) == ("labelled", ("c", "a", "b", "two lines"))
    assert {row["output"] for row in built.rows()} == {"a", "b", "c", "two lines"}


def test_too_many_labels_are_an_error_that_names_some(pets: Path) -> None:
    rows = [{"text": f"t{index}", "label": f"free answer {index}"} for index in range(65)]
    write_rows(pets, rows)
    for include_texts in (True, False):
        with pytest.raises(DataValidationError, match="more than 64") as refused:
            build(pets, AUTO, DataConfig(include_texts=include_texts))
        assert ("free answer 0" in str(refused.value)) is include_texts
    build(write_rows(pets, rows[:64]))


@pytest.mark.parametrize("columns", [{}, {"text": "report"}])
def test_a_csv_without_a_header_is_refused_and_its_row_quoted_only_if_texts_may_be(
    tmp_path: Path, columns: dict[str, str]
) -> None:
    source = tmp_path / "may.csv"
    source.write_text('"Hi, I am Jane Doe, my card 4111 is lost",lost_card\nWhere is my card?,card_arrival\n')
    task = TaskSchema(name="t", columns=columns)
    with pytest.raises(DataValidationError, match=r"^may\.csv has .*2 columns.*names above it") as refused:
        build(source, task, DataConfig())
    assert "Jane" not in str(refused.value) and "lost_card" not in str(refused.value)
    with pytest.raises(DataValidationError, match=r"'Hi, I am Jane Doe.*', 'lost_card' .*above it"):
        build(source, task, DataConfig(include_texts=True))


@pytest.mark.parametrize("row", ['"I am Jane Doe, lost_card\n', '"I" am Jane Doe, lost_card\n'])
def test_a_header_that_cannot_be_read_is_told_by_its_line(tmp_path: Path, row: str) -> None:
    (tmp_path / "may.csv").write_text(f"\n{row}Where is my card?,card_arrival\n")
    with pytest.raises(DataValidationError, match=r"^may\.csv .*\(line 2: ") as refused:
        build(tmp_path / "may.csv")
    assert "Jane" not in str(refused.value)


def test_an_arrival_is_refused_beyond_the_share_of_bad_rows_and_not_at_it(pets: Path) -> None:
    bad = [{"text": "", "label": "cat"}] * 25
    write_rows(pets, [*bad, *GOOD])
    built = build(pets, TASK, DataConfig(max_bad_share=0.2))
    with pytest.raises(ArrivalRefusedError) as refused:
        build(pets, TASK, DataConfig(max_bad_share=0.19))
    message, report = str(refused.value), refused.value.report
    assert message.startswith("pets.jsonl: 25 of 125 rows")
    assert "25 × empty text. The first: row 1 empty text: text is empty; row 2 " in message
    assert "\n" not in message and len(message) < 800
    assert (len(report.bad_rows), report.manifest.num_rejected, len(built.bad)) == (MAX_EXAMPLES, 25, 25)
    assert [path.name for path in built.folder.iterdir()] == ["quarantine.jsonl"], "also of an earlier dataset"
    tests = files_at(write_rows(pets.with_name("tests.jsonl"), GOOD[10:]))
    with pytest.raises(ArrivalRefusedError, match=r"^pets\.jsonl: 25 of 35 rows"):  # test rows make up for no bad row
        build(write_rows(pets, [*bad, *GOOD[:10]]), TASK, DataConfig(max_bad_share=0.7), test_sources=tests)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["", "  "], "has no rows"),
        ([{"text": "a", "label": "cat", "split": "test"}], "no row to train on"),
        ([{"text": "a", "label": "cat", "split": "train"}], "no row to test with"),
        (["broken"] * 3, "3 of 3 rows cannot be used"),
    ],
)
def test_an_arrival_that_cannot_be_learned_is_refused(pets: Path, rows: list[Any], message: str) -> None:
    write_rows(pets, rows)
    with pytest.raises(ArrivalRefusedError, match=message):
        build(pets, TASK, DataConfig())
    assert message in (check(pets, TASK, DataConfig()).refusal or "")


def test_a_file_that_was_cut_off_keeps_its_bad_rows_and_makes_no_dataset(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pets.jsonl.gz", [{"text": "", "label": "cat"}, *GOOD * 200])
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(DataValidationError, match="cut off"):
        build(source, TASK)
    assert quarantine_of(tmp_path / "dataset")[0]["row"] == 1
    assert [path.name for path in (tmp_path / "dataset").iterdir()] == ["quarantine.jsonl"]


# --- split


def test_frozen_texts_stay_test_rows_and_others_are_learned(pets: Path) -> None:
    first = build(write_rows(pets, GOOD), TASK)
    tested, frozen = {row["sha256"] for row in first.rows("test")}, first.input_digests("test")
    variants = [
        {"text": f"  {row['text'].replace(' ', '  ')}\r\n", "label": row["label"].upper()} for row in GOOD[::-1]
    ]
    more = [{"text": f"another {index}", "label": "cat"} for index in range(100)]
    second = build(write_rows(pets, [*more, *variants]), TASK, frozen_test_inputs=frozen)
    assert (second.manifest.num_rejected, second.manifest.num_train) == (0, 200 - len(tested))
    assert tested == {row["sha256"] for row in second.rows("test")}


def test_the_smallest_digests_of_texts_are_the_test_rows(pets: Path) -> None:
    """So a text is on one side, whatever its answers are."""
    built = build(write_rows(pets, [{**row, "label": label} for row in GOOD for label in ("cat", "dog")]), TASK)
    smallest = sorted(row_digest(row["text"]) for row in GOOD)[:30]
    assert built.manifest.num_test == 60
    for split in ("train", "test"):
        for row in built.rows(split):
            assert row["sha256"] == row_digest(row["input"], row["output"].casefold()).hex()
            assert (row_digest(row["input"]) in smallest) == (split == "test")


@pytest.mark.parametrize(("num_rows", "num_test"), [(2, 0), (3, 1), (89, 29), (90, 30), (600, 120)])
def test_a_first_arrival_gives_a_fifth_and_at_least_thirty_or_a_third(pets: Path, num_rows: int, num_test: int) -> None:
    rows = [{"text": f"t{index}", "label": "cat"} for index in range(num_rows)]
    write_rows(pets, rows)
    if not num_test:
        with pytest.raises(ArrivalRefusedError, match="no row to test with"):
            build(pets, TASK)
        return
    found = build(pets, TASK).manifest
    assert (found.num_train, found.num_test) == (num_rows - num_test, num_test)
    half = build(pets, TASK, DataConfig(test_share=0.5)).manifest
    assert half.num_test == pytest.approx(num_rows / 2, abs=0.5)
    assert build(write_rows(pets, rows[::-1]), TASK).manifest.sha256 == found.sha256


@pytest.mark.parametrize(("num_lacking", "num_added"), [(100, 14), (3, 3), (0, 0)])
def test_a_known_task_that_lacks_test_rows_gets_a_fifth_of_the_new_texts(
    pets: Path, num_lacking: int, num_added: int
) -> None:
    frozen, learned = ({row_digest(row["text"]) for row in part} for part in (TEXTS[:10], TEXTS[10:30]))
    known = {"frozen_test_inputs": frozen, "learned_inputs": learned, "num_lacking": num_lacking}
    built = build(write_rows(pets, TEXTS), TASK, **known)
    found = built.manifest
    assert (found.num_added, found.num_test, found.split) == (num_added, 10 + num_added, "hash")
    new = sorted(row_digest(row["text"]) for row in TEXTS[30:])  # what was learned never tests
    assert {*built.input_digests("test")} == frozen | {*new[:num_added]}
    assert build(write_rows(pets, TEXTS[::-1]), TASK, **known).manifest.sha256 == found.sha256
    if num_lacking:  # a file that names its test rows adds none, and a renewal replaces them
        assert build(write_rows(pets, halves(75, TEXTS)), TASK, **known).manifest.num_added == 0
        renewed = build(write_rows(pets, TEXTS), TASK, **known, renews_tests=True).manifest
        assert (renewed.num_added, renewed.num_test) == (0, 30)


def test_a_split_column_wins_and_a_training_row_never_equals_a_test_row(pets: Path) -> None:
    rows = halves(60)
    leaks = [{**rows[70], "split": "train"}, {**rows[0], "split": "train"}, {**rows[99], "split": " Test"}]
    bad = {"text": "x", "label": "cat", "split": "validation"}
    built = build(write_rows(pets, [leaks[0], *rows, *leaks[1:], bad]), TASK)
    assert (built.manifest.split, built.manifest.num_train, built.manifest.num_test) == ("given", 60, 40)
    assert [(entry["row"], entry["reason"]) for entry in built.bad] == [
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
    source = write_rows(tmp_path / f"pets.{kind}", drawn(25))
    built = build(source, TASK, frozen_test_inputs=FROZEN, renews_tests=True)
    assert (built.manifest.split, built.manifest.num_train) == ("given", 75)
    assert built.inputs("test") == {row["text"] for row in GOOD[75:]}
    assert build(source, TASK, frozen_test_inputs=FROZEN).manifest.num_train == len(GOOD), "none are renewed"
    assert build(source, TASK).manifest.split == "hash"


@pytest.mark.parametrize("num_random", [0, 9, 100])
def test_too_few_rows_drawn_at_random_or_nothing_else_leave_the_split_to_the_digests(
    pets: Path, num_random: int
) -> None:
    renewal = {"frozen_test_inputs": FROZEN, "renews_tests": True}
    plain = build(write_rows(pets, GOOD), TASK, **renewal).manifest
    found = build(write_rows(pets, drawn(num_random)), TASK, **renewal).manifest
    assert (found.split, found.sha256, found.num_rejected) == ("hash", plain.sha256, 0)
    named = [{**row, "split": "train" if index else "test"} for index, row in enumerate(drawn(num_random))]
    assert build(write_rows(pets, named), TASK, **renewal).manifest.num_test == 1, "a named split comes first"


def test_a_test_file_wins_over_a_split_column(pets: Path) -> None:
    tests = files_at(write_rows(pets.with_name("held_out.csv"), GOOD[78:]))
    train = [{**row, "split": "test"} for row in GOOD[:80]]
    built = build(write_rows(pets, train), TASK, test_sources=tests)
    found = built.manifest
    assert (found.split, found.num_read, found.num_train, found.num_test) == ("given", 102, 78, 22)
    assert [(entry["file"], entry["row"], entry["reason"]) for entry in built.bad] == [
        ("pets.jsonl", 79, "text of a test row"),
        ("pets.jsonl", 80, "text of a test row"),
    ]


@pytest.mark.parametrize("label", ["Dog", "cat"])
def test_a_training_row_with_the_text_of_a_frozen_test_row_is_bad(pets: Path, label: str) -> None:
    rows = halves(100)
    rows[3]["label"] = label
    built = build(write_rows(pets, rows), TASK, frozen_test_inputs=[row_digest(GOOD[3]["text"])])
    assert [(entry["row"], entry["reason"]) for entry in built.bad] == [(4, "text of a test row")]
    assert built.manifest.num_test == 0  # the frozen rows are there to test with


# --- identity


def test_a_dataset_is_the_same_whatever_its_order_format_and_file_name(pets: Path) -> None:
    one = build(write_rows(pets, GOOD), TASK).manifest
    shuffled = [{"Category": row["label"].upper(), "body": row["text"], "id": "7"} for row in GOOD[::-1]]
    two = build(write_rows(pets.with_name("other.csv"), shuffled), TASK).manifest
    three = build(write_rows(pets.with_name("third.parquet"), GOOD), TaskSchema(name="pets")).manifest
    assert one.sha256 == two.sha256 == three.sha256
    assert one.sha256[:16] == "668469162e89f26d", "as ever"
    others = [
        build(write_rows(pets, GOOD[1:]), TASK),
        build(write_rows(pets, [{**GOOD[0], "label": "Dog"}, *GOOD[1:]]), TASK),
        build(write_rows(pets, GOOD), TaskSchema(name="pets2", labels=TASK.labels)),
        build(pets, TASK, DataConfig(test_share=0.4)),
    ]
    assert len({one.sha256, *(each.manifest.sha256 for each in others)}) == 5
    assert build(write_rows(pets, halves(60)), TASK).manifest.sha256[:16] == "ad3bdafce7fe0107"


def test_how_an_arrival_landed_does_not_hang_on_the_test_rows_that_the_lineage_knows(pets: Path) -> None:
    frozen = [row_digest(row["text"]) for row in GOOD[::9]]
    moved = [{**halves(50)[0], "split": "test"}, *halves(50)[1:]]
    known = set()
    for rows in (GOOD, halves(50), moved):
        write_rows(pets, rows)
        alone, after_others = (build(pets, TASK, frozen_test_inputs=each).manifest for each in ((), frozen))
        assert alone.landed_sha256 == after_others.landed_sha256 and alone.sha256 != after_others.sha256
        known.add(alone.landed_sha256)
    assert len(known) == 3, "another split that the user gives is another arrival"
    tests = files_at(write_rows(pets.with_name("tests.jsonl"), GOOD[50:]))
    given = build(write_rows(pets, GOOD[:50]), TASK, test_sources=tests, frozen_test_inputs=frozen).manifest
    assert given.landed_sha256 in known


@pytest.mark.parametrize("rows", [GOOD, [{**row, "split": "test" if i % 3 else "train"} for i, row in enumerate(GOOD)]])
def test_the_same_arrival_again_is_the_same_dataset_against_its_own_test_rows(pets: Path, rows: list[Any]) -> None:
    first = build(write_rows(pets, rows), TASK)
    assert build(pets, TASK, frozen_test_inputs=first.input_digests("test")).manifest == first.manifest


# --- other formats


def test_completions_keep_their_white_space(tmp_path: Path) -> None:
    rows = [{"prompt": f"def f{index}():\r\n", "completion": "    return 1\r\n"} for index in range(50)]
    built = build(write_rows(tmp_path / "code.jsonl", rows))
    assert built.manifest.task.format == "completion"
    assert {(row["input"][-4:], row["output"]) for row in built.rows()} == {("():\n", "    return 1\n")}


LINES = st.one_of(
    st.sampled_from([line for line, *_ in BAD_LINES]),
    st.fixed_dictionaries({"text": st.text(max_size=8), "label": st.sampled_from(["dog", "CAT", "bird", ""])}),
    st.sampled_from(GOOD),
)


@settings(SHARED_FIXTURES, max_examples=15)
@given(lines=st.lists(LINES, max_size=25))
@example(lines=[{"text": "Ü", "label": "dog"}, {"text": "ü", "label": "dog"}])
def test_every_row_is_either_kept_or_in_quarantine(pets: Path, lines: list[Any]) -> None:
    """For any file, the kept rows are exactly the distinct good rows, but for those that nearly equal a test row."""
    built = build(write_rows(pets, [*GOOD, *lines]), TASK, LENIENT)
    kept = built.rows()
    assert built.manifest.num_read == 100 + len(lines)
    assert len({row["sha256"] for row in kept}) == len(kept)
    good = {
        (unicodedata.normalize("NFC", line["text"]).split()[0], line["label"].strip().casefold())
        for line in [*GOOD, *lines]
        if isinstance(line, dict) and isinstance(line.get("text"), str) and isinstance(line.get("label"), str)
        if line["text"].strip() and "\x00" not in line["text"] and line["label"].strip().casefold() in ("dog", "cat")
    }

    def short(row: dict[str, Any]) -> tuple[str, str]:
        return unicodedata.normalize("NFC", row["input"]).split()[0], row["output"].casefold()

    near = {short(entry["raw"]) for entry in built.bad if entry["reason"] == "nearly a test row"}
    tests = {text.casefold() for text, _ in map(short, built.rows("test"))}
    assert {text.casefold() for text, _ in near} <= tests, "so short texts nearly equal each other by capitals alone"
    assert {short(row) for row in kept} | near == good
