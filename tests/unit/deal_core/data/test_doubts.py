"""Rows that look wrong are named by their numbers, and rows that look right are not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, build_dataset
from deal_core.data.doubts import MAX_NAMED, labels_alike
from deal_core.data.row_warnings import data_warnings
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


def test_rows_of_several_files_are_named_with_their_files(tmp_path: Path) -> None:
    first = csv(tmp_path, [*LINES[:30], "text,label"], "a.csv")
    second = csv(tmp_path, ["text,label", *LINES[30:], *["text,label"] * MAX_NAMED], "b.csv")
    manifest = build(first, second)
    (warning,) = data_warnings(manifest, include_texts=False)
    assert "12 (a.csv row 31; b.csv rows 1, 32," in warning and "and 2 more)" in warning
    assert all(len(sentence.split()) <= 35 for sentence in warning.split(". "))
