"""What `evaluate.recentre` gives: accuracy with and without an offset per label, on rows that the offsets never saw.

    python -m benchmarks.recentring

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

from benchmarks.output import RESULTS, Out, write_result
from benchmarks.protocol import JUDGED, settings_shown, training_of
from deal_core.benchmark.answers import LabelledAnswers, unpack_answers
from deal_core.benchmark.suites import name_of
from deal_core.benchmark.summary import CellJson, departures, final_scores, method_name, read_cells
from deal_core.config import TrainConfig
from deal_core.evaluation.recentring import label_offsets

CELLS = ("benchmarks/results/continual", "benchmarks/results/development")
NUM_DRAWS = 20


def gained(task: LabelledAnswers, num_rows: int, seed: int) -> tuple[float, float]:
    """Accuracy of the greedy answers and of those with offsets, on the rows that were not drawn."""
    drawn = np.random.default_rng(seed).permutation(len(task.targets_N))
    fitted, others = drawn[:num_rows], drawn[num_rows:]
    is_right = np.array([answer == target for answer, target in zip(task.answers, task.targets_N, strict=True)])
    offsets_L = label_offsets(task.log_probs_NL[fitted], task.targets_N[fitted])
    choices = (task.log_probs_NL[others] + offsets_L).argmax(1)
    return float(is_right[others].mean()), float((choices == task.targets_N[others]).mean())


def figures(cell: CellJson, tasks: Sequence[str], row_counts: Sequence[int]) -> dict[str, Any] | None:
    """Mean accuracy over tasks in points: greedy, and by the number of drawn rows; None if a task has no scores."""
    scores = final_scores(cell)
    found = [unpack_answers(scores[name]) for name in tasks]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    pairs = {count: [gained(each, count, seed) for each in known for seed in range(NUM_DRAWS)] for count in row_counts}
    greedy = fmean(before for each in pairs.values() for before, _ in each)
    return {"greedy": 100 * greedy, **{str(count): 100 * fmean(after for _, after in each)
                                       for count, each in pairs.items()}}  # fmt: skip


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows to find offsets on.", show_default="36, 100")] = None,
    cells: Annotated[list[Path] | None, typer.Option(help="Folders of cells.", show_default=", ".join(CELLS))] = None,
    out: Out = RESULTS / "recentring.json",
) -> None:
    """Write the figures of every cell under today's training that keeps the scores of its labels."""
    counts, found = rows or [36, 100], []
    for cell in (cell for folder in cells or map(Path, CELLS) for cell in read_cells(folder)):
        settings = cell["settings"]
        if training_of(settings) != settings_shown(TrainConfig()):
            continue
        suite, order = name_of(tuple(settings["tasks"]))
        tasks = [name for name in settings["tasks"] if name in JUDGED]
        if tasks and (values := figures(cell, tasks, counts)):
            line = {"suite": suite, "order": order, "seed": settings["seed"], "part": settings["part"]}
            found.append({**line, "method": method_name(settings["strategy"], departures(cell)), **values})
    write_result(out, {"row_counts": counts, "num_draws": NUM_DRAWS, "cells": found})


if __name__ == "__main__":
    typer.run(main)
