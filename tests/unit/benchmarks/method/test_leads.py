"""How far a method leads another, and what it kept, in cells whose rows are known."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.method.leads import lead, points_of
from benchmarks.tables import Protocol


def cell(bits: str, *, seed: int = 0, strategy: str = "deal_without", first: str = "1111") -> dict[str, Any]:
    """A cell of two tasks. After the second one the first has `bits`, the second "10"."""
    scores = [{"yahoo": first}, {"yahoo": bits, "agnews": "10"}]
    return {
        "settings": {"strategy": strategy, "tasks": ["yahoo", "agnews"], "seed": seed, "method": {}, "train": {}},
        "versions": [{"scores": {task: {"correct": each} for task, each in one.items()}} for one in scores],
        "perplexity": {"base": 30.0},
    }


def protocol(*cells: dict[str, Any]) -> Protocol:
    return Protocol(suite="4", key="", base=None, per_task=(), joint=(), others=(), cells=cells)


def test_a_lead_is_over_the_common_seeds_in_points():
    ours, theirs = [cell("1110"), cell("1111", seed=1)], [cell("1000", strategy="rival")]
    found = lead(protocol(*ours, *theirs), "deal_without", "rival")
    assert found is not None and (found["num_cells"], found["is_of_one_processor"]) == (1, True)
    assert found["mean"] == pytest.approx(25.0) and found["low"] <= found["mean"] <= found["high"]
    assert lead(protocol(*ours), "deal_without", "rival") is None


def test_points_are_means_over_cells_right_after_learning_and_in_the_end():
    assert points_of([cell("1110"), cell("1000", seed=1, first="1100")]) == {
        "yahoo": (75.0, 50.0),
        "agnews": (50.0, 50.0),
    }
