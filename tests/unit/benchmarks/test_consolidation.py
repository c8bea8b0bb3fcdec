"""The figures of consolidation against adapting alone and retraining."""

from __future__ import annotations

from typing import Any

from benchmarks.consolidation import figures_of

TRAIN = {"num_epochs": 3, "max_steps": None, "batch_size": 8, "gradient_accumulation_steps": 1}


def cell(strategy: str, *versions: tuple[str | None, int, dict[str, str]]) -> dict[str, Any]:
    """A cell of two tasks of 16 rows; a version is its task, its steps and its right answers."""
    return {
        "settings": {
            "strategy": strategy,
            "tasks": ["a", "b"],
            "seed": 0,
            "rows": 16,
            "scored": "ends",
            "train": TRAIN,
            "method": {"rehearsal.per_step": 4},
        },
        "versions": [
            {"task": task, "num_steps": steps, "scores": {name: {"correct": bits} for name, bits in scores.items()}}
            for task, steps, scores in versions
        ],
    }


ADAPT = cell("deal", ("a", 6, {"a": "1111"}), ("b", 6, {"a": "1000", "b": "1110"}))
CONSOLIDATED = cell(
    "deal", ("a", 6, {"a": "1111"}), ("b", 6, {"a": "1000", "b": "1110"}), (None, 12, {"a": "1110", "b": "1110"})
)


def test_a_step_of_a_later_arrival_reads_rehearsed_rows_too() -> None:
    figures = figures_of("adapt", [ADAPT], [ADAPT])
    assert (figures.steps, figures.rows) == (12, 12 * 8 + 6 * 4)
    assert (figures.accuracy, figures.largest_debt, figures.difference) == (50.0, 75.0, None)


def test_a_consolidation_adds_its_steps_and_no_rehearsed_rows_and_repays_debts() -> None:
    figures = figures_of("every-5", [CONSOLIDATED], [ADAPT])
    assert (figures.steps, figures.rows) == (24, 24 * 8 + 6 * 4)
    assert figures.largest_debt == 25.0 and figures.difference is not None and figures.difference[0] == 25.0
