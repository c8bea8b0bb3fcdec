"""Cells that differ in one setting, and the labels of kept rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.method.kept_labels import kept_of
from benchmarks.method.pairs import CELLS, OUT, compare, main, pairs_of


def cell(bits: str, *, seed: int = 0, rate: float = 1e-3, base: float = 30.0, **method: Any) -> dict[str, Any]:
    settings = {
        "strategy": "deal",
        "tasks": ["yahoo", "agnews"],
        "seed": seed,
        "method": method,
        "train": {"learning_rate": rate},
    }
    scores = {"yahoo": {"correct": bits}, "agnews": {"correct": "1"}}
    return {"settings": settings, "versions": [{"scores": scores}], "perplexity": {"base": base, "adapted": 31.0}}


def test_a_pair_differs_in_one_setting_alone():
    without, with_it = cell("1000"), cell("1110", share=0.5)
    others = [cell("1111", seed=1, share=0.5), cell("1111", rate=1e-2, share=0.5), cell("1111", base=30.2, share=0.5)]
    found = [*pairs_of([without, *others, with_it], "method.share")]
    assert found == [(0.5, with_it, without)]
    assert [*pairs_of([without, cell("1111", share=0.5, other=1)], "method.share")] == []


def test_every_task_weighs_the_same_whatever_its_rows():
    found = compare(0.5, [(cell("1110"), cell("1000"))])
    (pair,) = found["pairs"]
    assert (pair["with"], pair["without"], found["mean"]) == (87.5, 62.5, 25.0)
    assert pair["difference_over_rows"]["mean"] == pytest.approx(25.0)
    assert found["low"] is None and not found["gains"], "one cell shows nothing"


@pytest.mark.parametrize(
    ("gained", "gains"),
    [([2, 2, 2, 4], True), ([2, 2, 2], False), ([1, 1, 1, 1], True), ([0, 1, 1, 1], False), ([9, -5, 9, -5], False)],
)
def test_a_gain_needs_four_cells_a_point_and_an_interval_above_zero(gained: list[int], gains: bool):
    """Of 50 rows of one of two tasks, each is a point of the mean."""
    before = "1" * 25 + "0" * 25
    pairs = [(cell("1" * (25 + more) + "0" * (25 - more)), cell(before)) for more in gained]
    assert compare(True, pairs)["gains"] is gains


def test_kept_labels_are_those_of_the_rows_that_the_method_keeps():
    rows = [{"output": f"label {number % 10}"} for number in range(150)]
    plain, fair = {"memory": "rows"}, {"memory": "rows", "rehearsal.balance_stored": True}
    assert kept_of(plain, rows, 2).total() == kept_of(fair, rows, 2).total() == 15
    assert len(kept_of(plain, rows, 2)) < len(kept_of(fair, rows, 2)) == 10
    assert kept_of({"memory": "none"}, rows, 2) == kept_of(plain, rows, 2), "chance alone"
    stored = {"rehearsal.texts": "stored", "rehearsal.stored_share": 0.2}
    assert kept_of(stored, rows, 2).total() == 30
    assert kept_of({"rehearsal.rows": 50, "rehearsal.per_step": 4}, rows, 2).total() == 38, "a cell of this release"


def test_stored_pairs_are_those_of_the_stored_cells(tmp_path: Path):
    """The page's figures are of the cells that lie beside them."""
    main(None, CELLS, tmp_path / "pairs.json")
    found, stored = (json.loads(path.read_text())["arms"] for path in (tmp_path / "pairs.json", OUT))
    assert found == stored
