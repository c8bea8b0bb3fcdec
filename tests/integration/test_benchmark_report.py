"""docs/benchmark.md is what its command writes from the stored cells: every figure on it comes from a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer import BadParameter

from benchmarks.report import main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_is_the_one_that_the_stored_cells_give(tmp_path: Path) -> None:
    main(results=RESULTS, page=tmp_path / "benchmark.md")
    assert (tmp_path / "benchmark.md").read_text() == (ROOT / "docs" / "benchmark.md").read_text()
    shown = {line.split("](")[1].rstrip(")") for line in (tmp_path / "benchmark.md").read_text().splitlines()
             if line.startswith("![")}  # fmt: skip
    assert shown and all((tmp_path / name).is_file() and (ROOT / "docs" / name).is_file() for name in shown)


def test_a_cell_more_or_less_is_another_page(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    next((tmp_path / "results" / "continual").glob("seq_lora-*.json")).unlink()
    main(results=tmp_path / "results", page=tmp_path / "benchmark.md")
    assert (tmp_path / "benchmark.md").read_text() != (ROOT / "docs" / "benchmark.md").read_text()


def test_a_result_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "continual").mkdir()
    with pytest.raises(BadParameter, match=r"step_cost\.json is not there"):
        main(results=tmp_path, page=tmp_path / "benchmark.md")
