"""How often the gate's paired interval holds the true drop: for right and wrong answers, and for graded scores.

    python -m benchmarks.paired_coverage

Every line draws many pairs of versions with a known drop. A one-sided bound of 95 % should hold it in 95 % of the
draws. Both bounds together are an interval of 90 %.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.output import write_result
from deal_core.evaluation.significance import PairedDrop

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], tuple[Floats, Floats]]
CONFIDENCE = 0.95
NUM_TRUE = 2_000_000
"""Rows whose mean difference counts as the true drop."""


def hits(lost: float, gained: float) -> Draw:
    """Right and wrong answers: the shares of rows that are lost and gained."""

    def draw(generator: np.random.Generator, num_rows: int) -> tuple[Floats, Floats]:
        chance = generator.random(num_rows)
        before = np.where(chance < lost, 1.0, np.where(chance < lost + gained, 0.0, generator.random(num_rows) < 0.5))
        after = np.where(chance < lost, 0.0, np.where(chance < lost + gained, 1.0, before))
        return before, after

    return draw


def graded(same: float, drop: float, spread: float) -> Draw:
    """Scores like ROUGE-L: skewed, some rows 0 and some 1; a share `same` of the answers stays as it was."""

    def draw(generator: np.random.Generator, num_rows: int) -> tuple[Floats, Floats]:
        before = generator.beta(1.2, 2.0, num_rows)
        chance = generator.random(num_rows)
        before = np.where(chance < 0.1, 0.0, np.where(chance > 0.95, 1.0, before))
        moved = np.clip(before - drop + spread * generator.standard_normal(num_rows), 0, 1)
        return before, np.where(generator.random(num_rows) < same, before, moved)

    return draw


CASES: dict[str, Draw] = {
    "hits: 10 % lost, 5 % gained": hits(0.10, 0.05),
    "hits: 20 % lost, 10 % gained": hits(0.20, 0.10),
    "hits: 30 % lost, 10 % gained": hits(0.30, 0.10),
    "hits: 2 % lost, 2 % gained": hits(0.02, 0.02),
    "graded: no drop": graded(0.3, 0.0, 0.2),
    "graded: drop of 10 points": graded(0.3, 0.1, 0.3),
    "graded: every answer moves a little": graded(0.0, 0.05, 0.1),
    "graded: four of five answers stay": graded(0.8, 0.0, 0.2),
    "graded: nine of ten stay, the tenth falls far": graded(0.9, 0.4, 0.2),
}


def coverage(draw: Draw, num_rows: int, num_draws: int) -> dict[str, float]:
    """Shares of draws in which the lower bound, the upper bound and both hold the true drop."""
    generator = np.random.default_rng(0)
    before, after = draw(generator, NUM_TRUE)
    true = 100 * float((before - after).mean())
    lower, upper = np.empty(num_draws), np.empty(num_draws)
    for number in range(num_draws):
        first, second = draw(generator, num_rows)
        lower[number] = PairedDrop.of(first.tolist(), second.tolist()).lower_bound(CONFIDENCE)
        upper[number] = -PairedDrop.of(second.tolist(), first.tolist()).lower_bound(CONFIDENCE)
    holds_lower, holds_upper = lower <= true, upper >= true
    return {
        "true_drop": true, "lower": 100 * float(holds_lower.mean()), "upper": 100 * float(holds_upper.mean()),
        "both": 100 * float((holds_lower & holds_upper).mean()),
    }  # fmt: skip


def main(
    draws: Annotated[int, typer.Option(help="Pairs of versions per line.")] = 10_000,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/paired_coverage.json"),
) -> None:
    """Print and write the coverage by case and number of rows."""
    lines: list[dict[str, Any]] = [
        {"case": case, "rows": num_rows, **coverage(draw, num_rows, draws)}
        for case, draw in CASES.items()
        for num_rows in (30, 100, 300)
    ]
    write_result(out, {"confidence": CONFIDENCE, "draws": draws, "lines": lines})


if __name__ == "__main__":
    typer.run(main)
