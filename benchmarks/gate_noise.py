"""The noise that the gate takes off a drop: does its interval hold the true drop, and how does it grow with fewer rows?

    python -m benchmarks.gate_noise coverage
    python -m benchmarks.gate_noise budget
    python -m benchmarks.gate_noise page

coverage: every line draws many pairs of versions with a known drop, for right and wrong answers and for graded scores.
A one-sided bound of 95 % should hold the drop in 95 % of the draws. Both bounds together are an interval of 90 %.

budget: nothing is trained. The outcomes are those of the stored cells of `deal`, where each version answered every row
of the tasks before it. Each pair of a version and the next one on an old task is told from the first n of its rows.

page: benchmarks/intervals.md, from the stored results of `coverage` and of `benchmarks.test_rows`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.continual.summary import CellJson, read_cells, row_scores
from benchmarks.output import RESULTS, Out, read, templates, write_result
from deal_core.config import EvaluateConfig
from deal_core.evaluation.significance import PairedDrop, smallest_clear_drop
from deal_core.judging_config import GateConfig

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], tuple[Floats, Floats]]
COVERED = 0.95
COVERAGE, PAGE = RESULTS / "paired_coverage.json", Path("benchmarks/intervals.md")
NUM_TRUE = 2_000_000
"""Rows whose mean difference counts as the true drop."""
NUM_TASKS = 50
"""Old tasks among which the budget of test rows is divided."""

app = typer.Typer(help=__doc__, rich_markup_mode=None)


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


def covered(draw: Draw, num_rows: int, num_draws: int) -> dict[str, float]:
    """Shares of draws in which the lower bound, the upper bound and both hold the true drop."""
    generator = np.random.default_rng(0)
    before, after = draw(generator, NUM_TRUE)
    true = 100 * float((before - after).mean())
    lower, upper = np.empty(num_draws), np.empty(num_draws)
    for number in range(num_draws):
        first, second = draw(generator, num_rows)
        lower[number] = PairedDrop.of(first.tolist(), second.tolist()).lower_bound(COVERED)
        upper[number] = -PairedDrop.of(second.tolist(), first.tolist()).lower_bound(COVERED)
    holds_lower, holds_upper = lower <= true, upper >= true
    return {
        "true_drop": true,
        "lower": 100 * float(holds_lower.mean()),
        "upper": 100 * float(holds_upper.mean()),
        "both": 100 * float((holds_lower & holds_upper).mean()),
    }


@app.command()
def coverage(
    draws: Annotated[int, typer.Option(help="Pairs of versions per line.")] = 10_000,
    out: Out = COVERAGE,
) -> None:
    """The coverage by case and number of rows."""
    lines = [
        {"case": case, "rows": num_rows, **covered(draw, num_rows, draws)}
        for case, draw in CASES.items()
        for num_rows in (30, 100, 300)
    ]
    write_result(out, {"confidence": COVERED, "draws": draws, "lines": lines})


def outcomes(cell: CellJson) -> Iterator[tuple[list[float], list[float]]]:
    """A version's scores on an old task's rows, and the next version's."""
    for before, after in itertools.pairwise(cell["versions"]):
        for task, scores in before["scores"].items():
            if task in after["scores"] and task != after["task"]:
                yield row_scores(scores), row_scores(after["scores"][task])


def told_from(
    pairs: list[tuple[list[float], list[float]]], num_rows: int, confidence: float
) -> dict[str, float | None]:
    """Mean noise of one task's drop, and of the mean drop of many tasks, in points."""
    drops = [PairedDrop.of(before[:num_rows], after[:num_rows]) for before, after in pairs]
    noise = NormalDist().inv_cdf(confidence) * statistics.mean(drop.standard_error for drop in drops)
    return {
        "rows_per_task": num_rows,
        "noise_of_one_drop": noise,
        "noise_of_the_mean_drop": noise / math.sqrt(NUM_TASKS),
        "smallest_clear_drop": smallest_clear_drop(num_rows, confidence),
    }


@app.command()
def budget(
    cells: Annotated[Path, typer.Option(help="Folder of the cells.")] = RESULTS / "continual",
    out: Out = RESULTS / "evaluation_budget.json",
) -> None:
    """The noise by the number of rows: half the width of the gate's one-sided interval."""
    settings_of = {"strategy": "deal", "scored": "all"}
    whole_cells = [cell for cell in read_cells(cells, oldest=2) if settings_of.items() <= cell["settings"].items()]
    pairs = [pair for cell in whole_cells for pair in outcomes(cell)]
    whole = min(len(before) for before, _ in pairs)
    num_rows, confidence = EvaluateConfig().max_old_rows, GateConfig().confidence
    write_result(
        out,
        {
            "num_pairs": len(pairs),
            "num_tasks": NUM_TASKS,
            "max_old_rows": num_rows,
            "rows_per_task_within_it": num_rows // NUM_TASKS,
            "confidence": confidence,
            "lines": [told_from(pairs, rows, confidence) for rows in (25, 50, 100, 200, whole) if rows <= whole],
        },
    )


@app.command()
def page(
    results: Annotated[Path, typer.Option(help="Folder of the stored results.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Page to write.")] = PAGE,
) -> None:
    """Write the page of how often the gate's intervals hold the truth."""
    coverage, few_tests = read(results / COVERAGE.name), read(results / "test_rows.json")
    template = templates().get_template("intervals.md.j2")
    out.write_text(template.render(coverage=coverage, few_tests=few_tests), encoding="utf-8")


if __name__ == "__main__":
    app()
