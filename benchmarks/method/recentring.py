"""What offsets of labels give: accuracy with and without an offset per label, on rows that the offsets never saw.

    python -m benchmarks.method.recentring

The cells keep the log-probability of every label for every test row. For each task with labels, `--rows` test rows are
drawn, and the offsets are found on them as a version finds them. The other test rows are answered with the offsets.
This is repeated `NUM_DRAWS` times. Suite 15 stands for its seven tasks that measure something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.continual.summary import CellJson, final_scores
from benchmarks.method.protocol import todays_cells
from benchmarks.output import RESULTS, Out, write_result
from benchmarks.stored_cells import LabelledAnswers, unpack_answers
from benchmarks.tables import JUDGED
from deal_core.evaluation.label_scores import label_offsets

NUM_DRAWS = 20


def gained(task: LabelledAnswers, num_rows: int, seed: int) -> tuple[float, float]:
    """Accuracy of the greedy answers and of those with offsets, on the rows that were not drawn."""
    drawn = np.random.default_rng(seed).permutation(len(task.targets_N))
    fitted, others = drawn[:num_rows], drawn[num_rows:]
    is_right = np.array([answer == target for answer, target in zip(task.answers, task.targets_N, strict=True)])
    offsets_L = label_offsets(task.log_probs_NL[fitted], task.targets_N[fitted])
    choices = (task.log_probs_NL[others] + offsets_L).argmax(1)
    return float(is_right[others].mean()), float((choices == task.targets_N[others]).mean())


def figures(cell: CellJson, row_counts: Sequence[int]) -> dict[str, Any] | None:
    """Mean accuracy over JUDGED in points: greedy, and by the number of drawn rows; None if there are no scores."""
    unpacked = (unpack_answers(score) for name, score in final_scores(cell).items() if name in JUDGED)
    tasks = [answers for answers in unpacked if answers is not None]
    if not tasks:
        return None
    pairs = {count: [gained(task, count, seed) for task in tasks for seed in range(NUM_DRAWS)] for count in row_counts}
    greedy = fmean(before for of_count in pairs.values() for before, _ in of_count)
    return {
        "greedy": 100 * greedy,
        **{str(count): 100 * fmean(after for _, after in of_count) for count, of_count in pairs.items()},
    }


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows to find offsets on.", show_default="36, 100")] = None,
    cells: Annotated[
        list[Path] | None, typer.Option(help="Folders of cells.", show_default="continual, development")
    ] = None,
    out: Out = RESULTS / "recentring.json",
) -> None:
    """Write the figures of every cell under today's training that keeps the scores of its labels."""
    counts = rows or [36, 100]
    lines = [{**line, **values} for cell, line in todays_cells(cells) if (values := figures(cell, counts))]
    write_result(out, {"row_counts": counts, "num_draws": NUM_DRAWS, "cells": lines})


if __name__ == "__main__":
    typer.run(main)
