"""The benchmark of selection: few rows of many are trained on, in memory that does not grow with the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import selection
from benchmarks.continual.suites import SuiteTask
from benchmarks.noisy_pool import corrupted
from deal_core.data.schema import TaskSchema

MAX_GROWTH = 300 * 2**20
"""Bytes that ten times as many rows may take: their labels and numbers, and what the allocator keeps."""


def test_one_in_a_hundred_rows_is_trained_on_and_a_model_reads_no_more_than_asked() -> None:
    found = selection.choose_and_train(3_000, "loss", 0.01, 250)
    assert (found["chosen"], found["steps"]) == (30, 4)
    assert found["notes"][0] == "30 of 3,000 training rows were chosen by loss, 6 of each of 5 labels"
    assert "read 250 rows drawn at random" in found["notes"][1]


@pytest.mark.nightly
def test_a_hundred_thousand_rows_are_chosen_from_in_bounded_memory(tmp_path: Path) -> None:
    out = tmp_path / "selection.json"
    ran = CliRunner().invoke(selection.app, ["cost", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    few, many = json.loads(out.read_text())["runs"]
    assert (few["rows"], few["chosen"], many["rows"], many["chosen"]) == (10_000, 100, 100_000, 1_000)
    assert many["peak_bytes"]["after"] - few["peak_bytes"]["after"] < MAX_GROWTH


def test_a_share_of_the_labels_is_replaced_by_other_labels_of_the_task() -> None:
    schema = TaskSchema(name="colours", labels=("red", "green", "blue"))
    rows = tuple({"input": str(number), "output": schema.labels[number % 3]} for number in range(1000))
    noisy = corrupted(SuiteTask(schema=schema, train=rows, test=rows), 0.3, 0)
    labels, wrong = [row["label"] for row in noisy], {number for number, row in enumerate(noisy) if "was" in row}
    assert wrong == {number for number, row in enumerate(rows) if row["output"] != labels[number]}
    assert 250 < len(wrong) < 350 and {labels[number] for number in wrong} == set(schema.labels)
