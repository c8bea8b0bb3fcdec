"""Rows that look wrong are named by their numbers, and rows that look right are not."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, build_dataset
from deal_core.data.doubts import MAX_NAMED, DoubtFinder, labels_alike, likeness
from deal_core.data.good_rows import good_rows
from deal_core.data.reading.batches import ParquetRows
from deal_core.data.row_warnings import data_warnings
from deal_core.data.rows import Row, stored_input_digest
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.data.source_files import files_at

AUTO = TaskSchema(name="t", format="auto", metric="auto", assistant_turns="all")
LINES = [f"The parcel number {number} is late,{('late', 'lost')[number % 2]}" for number in range(60)]
GOOD = [dict(zip(("text", "label"), line.split(","), strict=True)) for line in LINES]


def write(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def csv(folder: Path, lines: Sequence[str], name: str = "rows.csv") -> Path:
    return write(folder / name, ["text,label", *lines])


def jsonl(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    return write(folder / "rows.jsonl", [json.dumps(row) for row in rows])


def build(*files: Path, task: TaskSchema = AUTO, **options: Any) -> DatasetManifest:
    sources = tuple(file for path in files for file in files_at(path))
    folder = files[0].parent / "dataset"
    manifest = build_dataset(
        Landing(sources=sources, task=task, config=DataConfig(max_bad_share=1.0), **options), folder
    )
    assert DatasetManifest.from_json(json.loads((folder / "manifest.json").read_text())) == manifest
    return manifest


def named(manifest: DatasetManifest) -> dict[str, list[int]]:
    return {doubt.kind: [row for _, row in doubt.rows] for doubt in manifest.doubts}


def test_a_stray_quote_that_swallows_rows_is_named(tmp_path: Path) -> None:
    lines = [*LINES]
    lines[20], lines[35] = f'"{lines[20]}', 'A screen of 15",late'
    manifest = build(csv(tmp_path, lines))
    assert manifest.num_read == 45 and named(manifest) == {"swallowed rows": [21]}
    for include_texts in (False, True):
        (warning,) = data_warnings(manifest, include_texts=include_texts)
        assert "1 (row 21)" in warning and "parcel" not in warning


@pytest.mark.parametrize(
    "cell",
    [
        "Dear Sir,\nmy card is lost.\nPlease help, thanks, and soon.",
        "one line\nand another\nand a third",
        "a list:\n\n- milk, bread\n- eggs, flour",
    ],
)
def test_a_text_of_several_lines_is_not_in_doubt(tmp_path: Path, cell: str) -> None:
    assert build(csv(tmp_path, [*LINES, f'"{cell}",late'])).doubts == ()


@pytest.mark.parametrize("header", ["text,label", "\ufefftext,label"])
def test_a_header_inside_a_file_is_a_bad_row_and_named(tmp_path: Path, header: str) -> None:
    manifest = build(csv(tmp_path, [*LINES[:30], header, *LINES[30:]]))
    assert named(manifest) == {"repeated header": [31]} and manifest.num_rejected == 1
    assert sorted(manifest.task.labels) == ["late", "lost"], "no label is called label"


def test_labels_that_differ_by_invisible_characters_are_named(tmp_path: Path) -> None:
    rows = [*GOOD, {"text": "more of it", "label": "lo\u200bst"}, {"text": "and more", "label": "late\u00ad"}]
    manifest = build(jsonl(tmp_path, rows))
    assert named(manifest) == {"labels alike": [61, 62]}
    (warning,) = [each for each in data_warnings(manifest, include_texts=True) if each.startswith("Labels that differ")]
    assert "2 (rows 61, 62)" in warning and r"'lost' and 'lo\u200bst'" in warning
    assert not any("lost" in each for each in data_warnings(manifest, include_texts=False))


def test_a_label_that_differs_from_the_tasks_by_invisible_characters_says_so(tmp_path: Path) -> None:
    task = TaskSchema(name="t", labels=("late", "lost"))
    build(jsonl(tmp_path, [*GOOD, {"text": "more of it", "label": "lo\u200bst"}]), task=task)
    (bad,) = map(json.loads, (tmp_path / "dataset" / "quarantine.jsonl").read_text().splitlines())
    assert r"lo\u200bst: it differs from a label" in bad["value"] and "lost" not in bad["why"]


def test_only_labels_that_look_the_same_are_alike() -> None:
    assert labels_alike(["a b", "a\u200b b", "ab", "ä", "a", "a \u2060b"]) == [("a b", "a\u200b b", "a \u2060b")]
    assert labels_alike(["heart \u2764", "heart \u2764\ufe0f"]) != []


TEXT = st.text(st.sampled_from("aBc .é\nÉß"), max_size=8)


def by_the_rule(text: str) -> str:
    return "".join(text.casefold().split()).rstrip(".")


@given(st.lists(TEXT, min_size=2, max_size=12))
def test_likeness_is_that_of_the_rule(texts: list[str]) -> None:
    found = likeness("labelled", pa.array(texts))
    for one, first in zip(found, texts, strict=True):
        for other, second in zip(found, texts, strict=True):
            assert (one == other) == (by_the_rule(first) == by_the_rule(second)), (first, second)


VARIANTS = ["the parcel NUMBER 7 is late", "The parcel number 7 is late.", "The  parcel number 7 is late .", "Öl 7."]


@pytest.mark.parametrize("is_first", [False, True])
def test_a_test_row_like_a_training_row_is_named(tmp_path: Path, is_first: bool) -> None:
    tests = [{"text": text, "label": "late", "split": "test"} for text in [*VARIANTS, "another text"]]
    train = [{**row, "split": "train"} for row in [*GOOD, {"text": "öl 7", "label": "late"}]]
    rows = [*tests, *train] if is_first else [*train, *tests]
    start = 1 if is_first else len(train) + 1
    manifest = build(jsonl(tmp_path, rows))
    assert named(manifest) == {"tests alike": [start, start + 1, start + 2, start + 3]}
    assert (manifest.num_train, manifest.num_test) == (61, 5), "they are kept"


def test_a_chat_that_is_like_a_training_chat_is_named(tmp_path: Path) -> None:
    def row(asked: str, split: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"Yes, {asked}"}]
        return {"messages": messages, "split": split}

    rows = [row(f"Question {number}", "train") for number in range(9)]
    assert named(build(jsonl(tmp_path, [*rows, row("question 4.", "test"), row("q", "test")]))) == {"tests alike": [10]}


def test_a_training_row_like_one_of_the_lineages_test_rows_is_named(tmp_path: Path) -> None:
    before = ["The bill number 3 is wrong", "Where is it?"]
    frozen = {
        "frozen_test_inputs": [stored_input_digest("labelled", text) for text in before],
        "frozen_likeness": likeness("labelled", pa.array(before)),
    }
    rows = [*GOOD, {"text": "the bill number 3 is wrong.", "label": "late"}, {"text": before[1], "label": "late"}]
    manifest = build(jsonl(tmp_path, rows), **frozen)
    assert named(manifest) == {"tests alike": [61]} and manifest.num_test == 1


def test_rows_of_several_files_are_named_with_their_files(tmp_path: Path) -> None:
    first = csv(tmp_path, [*LINES[:30], "text,label"], "a.csv")
    second = csv(tmp_path, ["text,label", *LINES[30:], *["text,label"] * MAX_NAMED], "b.csv")
    manifest = build(first, second)
    (warning,) = data_warnings(manifest, include_texts=False)
    assert "12 (a.csv row 31; b.csv rows 1, 32," in warning and "and 2 more)" in warning
    assert all(len(sentence.split()) <= 35 for sentence in warning.split(". "))


def test_memory_grows_by_a_number_a_row() -> None:
    number, size = 200_000, 10_000
    finder = DoubtFinder(TaskSchema(name="t", labels=("a",)), (), brings_tests=True)
    tracemalloc.start()
    try:
        for start in range(0, number, size):
            rows = [Row("long " * 20 + str(row), "a", bytes(32), bytes(32), None) for row in range(start, start + size)]
            batch = ParquetRows(pa.RecordBatch.from_pydict({"text": [""] * size}), start + 1, None)
            finder.read("a.parquet", batch, good_rows(rows))
            finder.keep(batch, good_rows(rows), "test" if start % (5 * size) == 0 else "train")
        del rows, batch
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < number * 16
    assert finder.found() == ()
