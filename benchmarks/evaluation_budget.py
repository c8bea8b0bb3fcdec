"""What a budget of test rows costs in certainty: how much of a drop is noise, told from fewer rows?

    python -m benchmarks.evaluation_budget

Nothing is trained: the outcomes are those of the stored cells of `deal` (benchmarks/results/continual), where each
version answered every row of the tasks before it. Each pair of a version and the next one on an old task is told from
the first n of its rows; noise is what the gate takes off, the half width of its one-sided interval.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import typer

from benchmarks.output import write_result
from deal_core.benchmark.summary import CellJson, read_cells
from deal_core.config import EvaluateConfig
from deal_core.evaluation.significance import PairedDrop, smallest_clear_drop
from deal_core.judging_config import GateConfig

NUM_TASKS = 50
CONFIDENCE = GateConfig().confidence


def outcomes(cell: CellJson) -> Iterator[tuple[str, str]]:
    """A version's outcomes on an old task, and the next version's."""
    versions = cell["versions"]
    for before, after in itertools.pairwise(versions):
        for task, scores in before["scores"].items():
            if task in after["scores"] and task != after["task"]:
                yield scores["correct"], after["scores"][task]["correct"]


def told_from(pairs: list[tuple[str, str]], num_rows: int) -> dict[str, float | int | None]:
    """Mean noise of one task's drop, and of the mean drop of many tasks, in points."""
    drops = [PairedDrop.of(*(list(map(int, each[:num_rows])) for each in pair)) for pair in pairs]
    noise = NormalDist().inv_cdf(CONFIDENCE) * statistics.mean(drop.standard_error for drop in drops)
    return {
        "rows_per_task": num_rows,
        "noise_of_one_drop": noise,
        "noise_of_the_mean_drop": noise / math.sqrt(NUM_TASKS),
        "smallest_clear_drop": smallest_clear_drop(num_rows, CONFIDENCE),
    }


def main(
    cells: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("benchmarks/results/continual"),
    out: Annotated[
        Path, typer.Option(help="Where the figures go.")
    ] = Path("benchmarks/results/evaluation_budget.json"),
) -> None:
    """Print and write the noise by the number of rows."""
    found = [cell for cell in read_cells(cells) if cell["settings"]["strategy"] == "deal"]
    pairs = [pair for cell in found if cell["settings"]["scored"] == "all" for pair in outcomes(cell)]
    whole = min(len(before) for before, _ in pairs)
    budget = EvaluateConfig().max_old_rows
    write_result(out, {
        "num_pairs": len(pairs), "num_tasks": NUM_TASKS, "max_old_rows": budget,
        "rows_per_task_within_it": budget // NUM_TASKS, "confidence": CONFIDENCE,
        "lines": [told_from(pairs, num_rows) for num_rows in (25, 50, 100, 200, whole) if num_rows <= whole],
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
