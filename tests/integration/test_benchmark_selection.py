"""The benchmark of selection: few rows of many are trained on, in memory that does not grow with the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import noisy_pool, selection
from deal_core.benchmark.suites import digest_of, load_suite

MAX_GROWTH = 300 * 2**20
"""Bytes that ten times as many rows may take: their labels and numbers, and what the allocator keeps."""


def test_one_in_a_hundred_rows_is_trained_on_and_a_model_reads_no_more_than_asked() -> None:
    found = selection.choose_and_train(3_000, "loss", 0.01, 250)
    assert (found["chosen"], found["steps"]) == (30, 4)
    assert found["notes"][0] == "30 of 3,000 training rows were chosen by loss (the highest), 6 of each of 5 labels"
    assert "read 250 rows drawn at random" in found["notes"][1]


@pytest.mark.nightly
def test_a_hundred_thousand_rows_are_chosen_from_in_bounded_memory(tmp_path: Path) -> None:
    out = tmp_path / "selection.json"
    ran = CliRunner().invoke(_app(selection.main), ["--out", str(out)])
    assert ran.exit_code == 0, ran.output
    few, many = json.loads(out.read_text())["runs"]
    assert (few["rows"], few["chosen"], many["rows"], many["chosen"]) == (10_000, 100, 100_000, 1_000)
    assert many["peak_bytes"]["after"] - few["peak_bytes"]["after"] < MAX_GROWTH


def test_a_pool_with_wrong_labels_has_the_test_rows_of_the_tasks(tmp_path: Path) -> None:
    labels = ["red", "green", "blue"]
    data = tmp_path / "data"
    data.mkdir()
    (data / "tasks.json").write_text(json.dumps({"colours": {"instruction": "Which colour?", "labels": labels}}))
    for part, number in (("train", 1000), ("test", 20)):
        rows = [{"text": f"{part} {row}", "label": labels[row % 3]} for row in range(number)]
        (data / f"colours.{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--data", str(data), "--out", str(tmp_path / "noisy"), "--task", "colours", "--share", "0.3"]
    assert CliRunner().invoke(_app(noisy_pool.main), arguments).exit_code == 0
    clean, noisy = (load_suite(folder, ("colours",)) for folder in (data, tmp_path / "noisy"))
    assert noisy["colours"].test == clean["colours"].test and digest_of(noisy) != digest_of(clean)
    pairs = zip(noisy["colours"].train, clean["colours"].train, strict=True)
    wrong = [one for one, other in pairs if one["output"] != other["output"]]
    assert 250 < len(wrong) < 350 and {row["output"] for row in wrong} == set(labels)


def _app(main):
    import typer

    app = typer.Typer()
    app.command()(main)
    return app
