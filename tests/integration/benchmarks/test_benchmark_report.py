"""The pages of benchmarks equal the output of their commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer import BadParameter

from benchmarks import gate_noise, headline, performance
from benchmarks.speed import base_models

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_benchmarks_page_and_the_readme_say_what_the_stored_cells_give(tmp_path: Path) -> None:
    headline.page(cells=RESULTS / "final", out=tmp_path / "benchmark.md")
    assert (tmp_path / "benchmark.md").read_text() == (ROOT / "docs" / "benchmark.md").read_text()
    shown = {
        line.split("](")[1].rstrip(")")
        for line in (tmp_path / "benchmark.md").read_text().splitlines()
        if line.startswith("![")
    }
    assert shown and all((tmp_path / name).is_file() and (ROOT / "docs" / name).is_file() for name in shown)
    readme = " ".join((ROOT / "README.md").read_text().replace("**", "").split())
    assert headline.claim(headline.read_arms(RESULTS / "final")) in readme


def test_a_result_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match=r"paired_coverage\.json is not there"):
        gate_noise.page(results=tmp_path, out=tmp_path / "intervals.md")


def test_the_page_of_the_gates_intervals_is_the_one_that_the_stored_results_give(tmp_path: Path) -> None:
    gate_noise.page(results=RESULTS, out=tmp_path / "intervals.md")
    assert (tmp_path / "intervals.md").read_text() == (ROOT / "benchmarks" / "intervals.md").read_text()


def test_the_page_of_performance_is_the_one_that_the_stored_results_give(tmp_path: Path) -> None:
    performance.main(results=RESULTS, page=tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text()


def test_the_page_of_models_is_the_one_that_their_shapes_give(tmp_path: Path) -> None:
    base_models.main(page=tmp_path / "model.md")
    assert (tmp_path / "model.md").read_text() == (ROOT / "docs" / "model.md").read_text()


def test_three_values_have_a_range_and_prove_nothing_on_either_side_of_a_limit() -> None:
    interval = (1.5, -0.25, 1.75)
    assert performance.spread(interval, 3, 2) == "range of 3: −0.25 to 1.75"
    assert performance.spread(interval, 20, 2) == "n = 20, 95 % interval of the mean −0.25 to 1.75"
    verdicts = {
        (limit, count): performance.not_above(limit, interval, count) for limit in (-1, 1, 2) for count in (3, 20)
    }
    assert verdicts == {
        (-1, 3): "**missed**",
        (1, 3): "n = 3, not told apart",
        (2, 3): "reached",
        (-1, 20): "**missed**",
        (1, 20): "reached",
        (2, 20): "reached",
    }
