"""Tasks in the layout of CL_Benchmark become the files that the benchmark reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cl_benchmark import convert
from benchmarks.continual.suites import digest_of, load_suite

ROWS = [{"sentence": f"text {i}", "label": "ab"[i % 2]} for i in range(10)]


@pytest.fixture
def cl_benchmark(tmp_path: Path) -> Path:
    home = tmp_path / "CL_Benchmark" / "TC" / "agnews"
    home.mkdir(parents=True)
    (home / "labels.json").write_text('["a", "b"]')
    for part in ("train", "dev"):
        (home / f"{part}.json").write_text(json.dumps(ROWS))
    return home.parent.parent


def test_rows_are_shuffled_the_same_way_each_time(cl_benchmark: Path, tmp_path: Path) -> None:
    assert convert(cl_benchmark, tmp_path / "out") == ["agnews"]
    task = load_suite(tmp_path / "out", ("agnews",))["agnews"]
    assert task.train == task.test, "dev.json stands in for the missing test.json"
    inputs = [row["input"] for row in task.train]
    assert inputs != sorted(inputs) and sorted(inputs) == [row["sentence"] for row in ROWS]
    assert task.schema.instruction.startswith("What is the topic")
    (cl_benchmark / "TC" / "agnews" / "test.json").write_text('[{"sentence": "x", "label": "a"}]')
    convert(cl_benchmark, tmp_path / "out")
    assert len(load_suite(tmp_path / "out", ("agnews",))["agnews"].test) == 1


def test_the_digest_is_that_of_the_stored_cells_which_read_the_layout_itself(
    cl_benchmark: Path, tmp_path: Path
) -> None:
    convert(cl_benchmark, tmp_path / "out")
    digest = digest_of(load_suite(tmp_path / "out", ("agnews",)))
    assert digest == "8bdf731cecdab8cc67ee95f30ef7beaba7575b60c211a817543b805fd8980e6c"
