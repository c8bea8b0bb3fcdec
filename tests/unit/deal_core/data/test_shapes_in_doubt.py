"""Files that look like another shape are told apart by their cells, and label cells are read in any spelling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, ValidationReport, validate_file
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import DataValidationError

AUTO = TaskSchema(name="t", format="auto")
NUM_ROWS = 40


def checked(path: Path, content: Sequence[dict[str, Any]], task: TaskSchema = AUTO) -> ValidationReport:
    """The report on a file of these rows."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(content)), path)
    elif path.suffix == ".csv":
        lines = [",".join(content[0]), *(",".join(map(str, row.values())) for row in content)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return validate_file(Landing(sources=files_at(path), task=task, config=DataConfig(max_bad_share=1.0)))


def rated(*labels: object) -> list[dict[str, Any]]:
    """Completions with these labels in turn."""
    return [
        {"prompt": f"Q {number}", "completion": f"A {number}", "label": labels[number % len(labels)]}
        for number in range(NUM_ROWS)
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rated_answers_are_refused_in_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataValidationError, match=r"holds rated answers: prompt, completion, and a label"):
        checked(tmp_path / f"rows{suffix}", rated(True, False))


@pytest.mark.parametrize("labels", [("TRUE", "FALSE"), ("true", "", " false")])
def test_a_csv_may_write_the_rating_as_it_likes(labels: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataValidationError, match="holds rated answers"):
        checked(tmp_path / "rows.csv", rated(*labels))


@pytest.mark.parametrize("labels", [("true", "false", "unknown"), ("",), ("easy", "hard")])
def test_a_csv_whose_labels_are_no_rating_is_learned(labels: tuple[str, ...], tmp_path: Path) -> None:
    report = checked(tmp_path / "rows.csv", rated(*labels))
    assert report.shape == "completions (prompt, completion)" and report.manifest.num_rejected == 0


def test_true_and_false_may_be_the_labels_of_texts(tmp_path: Path) -> None:
    content = [{"text": f"Text {number}", "label": number % 2 == 0} for number in range(NUM_ROWS)]
    assert set(checked(tmp_path / "rows.csv", content).manifest.task.labels) == {"True", "False"}


def test_answers_that_are_json_lists_are_completions(tmp_path: Path) -> None:
    content = [
        {"prompt": json.dumps([{"page": number}]), "completion": json.dumps([{"name": "Ann", "age": number}])}
        for number in range(NUM_ROWS)
    ]
    report = checked(tmp_path / "rows.jsonl", content)
    assert report.shape == "completions (prompt, completion)" and report.manifest.num_rejected == 0
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "[]"} for row in content]
    report = checked(tmp_path / "rows.jsonl", pairs)
    assert report.shape == "preferences (prompt, chosen over rejected)" and report.manifest.num_rejected == 0


def test_messages_as_json_texts_are_still_a_chat(tmp_path: Path) -> None:
    content = [
        {
            "prompt": json.dumps([{"role": "user", "content": f"Hi {number}"}]),
            "completion": json.dumps([{"from": "gpt", "value": "Hello"}]),
        }
        for number in range(NUM_ROWS)
    ]
    assert checked(tmp_path / "rows.jsonl", content).shape == "chats in two columns (prompt, completion)"


# --- label_names


def named(**names: str) -> TaskSchema:
    return TaskSchema(name="t", labels=("spam", "ham"), label_names=names)


@pytest.mark.parametrize(
    ("suffix", "cells", "names"),
    [
        (".jsonl", (True, False), {"true": "spam", "false": "ham"}),
        (".csv", ("Yes", "NO"), {"yes": "spam", "no": "ham"}),
        (".csv", ("yes", "no"), {"Yes": "spam", "No": "ham"}),
        (".csv", ("1.0", "0.0"), {"1": "spam", "0": "ham"}),
        (".csv", ("M", "m"), {"M": "spam", "m": "ham"}),
    ],
)
def test_label_names_are_found_in_any_case(
    suffix: str, cells: tuple[object, ...], names: dict[str, str], tmp_path: Path
) -> None:
    content = [{"text": f"Text {number}", "label": cells[number % 2]} for number in range(NUM_ROWS)]
    manifest = checked(tmp_path / f"rows{suffix}", content, named(**names)).manifest
    assert manifest.num_rejected == 0


def test_a_cell_that_two_names_fit_in_another_case_is_a_bad_row(tmp_path: Path) -> None:
    content = [{"text": f"Text {number}", "label": ("Yes", "yes", "YES")[number % 3]} for number in range(30)]
    manifest = checked(tmp_path / "rows.csv", content, named(Yes="spam", yes="ham")).manifest
    assert dict(manifest.problems) == {"label outside the task's set": 10}
