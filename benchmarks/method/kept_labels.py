"""Whether the labels of the rows that `deal` keeps move the answers to old tasks.

    python -m benchmarks.method.kept_labels --data FOLDER

A tenth of 150 rows is 15 rows. A plain random sample of them lacks labels of a task with ten or more, and has too many
of others. The cells keep the answers to test rows. For every label of an old task two numbers are compared:

- kept: its share among the kept rows minus its share among the training rows;
- answered: its share among the answers in the end minus its share among the test rows.

Cells that keep no rows are given the sample that they would have kept. They show what chance alone does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.continual.suites import load_suite
from benchmarks.continual.summary import CellJson, final_scores
from benchmarks.method.asked import AskedOptions
from benchmarks.method.protocol import todays_cells
from benchmarks.output import RESULTS, Out, write_result
from benchmarks.stored_cells import unpack_answers
from deal_core.data.order import stratified_sample
from deal_core.evaluation.metrics import plain_answer
from deal_core.method_config import RehearsalConfig


def kept_of(method: Mapping[str, Any], rows: Sequence[dict[str, Any]], seed: int) -> Counter[str]:
    """How often each label stands among the rows that a cell with these settings keeps of an arrival.

    Of a cell that keeps none, the rows are those that `memory: rows` would have kept.
    """
    labels = [plain_answer(row["output"]) for row in rows]
    if limit := method.get("rehearsal.rows"):
        places = stratified_sample(labels, RehearsalConfig(rows=limit).num_kept(len(labels)), seed)
    else:
        names = [field.name for field in fields(AskedOptions) if f"rehearsal.{field.name}" in method]
        options = AskedOptions(**{name: method[f"rehearsal.{name}"] for name in names})
        if not options.keeps_rows:  # a cell with `memory` says nothing else of its texts
            options = replace(options, texts="both", stored_share=0.1, max_stored_rows=200)
        places = options.places_kept(labels, seed)
    return Counter(labels[place] for place in places)


def pairs_of(cell: CellJson, folder: Path) -> Iterator[tuple[float, float]]:
    """(kept, answered) of every label of every task but the last, which was learned after all rows were kept."""
    settings, scores = cell["settings"], final_scores(cell)
    answers_to = {name: unpack_answers(scores[name]) for name in settings["tasks"]}
    if None in answers_to.values():
        return
    suite = load_suite(folder, tuple(settings["tasks"]))
    for name in settings["tasks"][:-1]:
        answered, rows = answers_to[name], suite[name].train[: settings["rows"]]
        assert answered is not None
        kept = kept_of(settings["method"], rows, settings["seed"])
        all_rows = Counter(plain_answer(row["output"]) for row in rows)
        answers, targets = Counter(map(plain_answer, answered.texts())), Counter(answered.targets_N.tolist())
        for number, label in enumerate(map(plain_answer, answered.labels)):
            yield (
                kept[label] / kept.total() - all_rows[label] / len(rows),
                (answers[label] - targets[number]) / len(answered.targets_N),
            )


def figures(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The correlation with its 95 % interval by Fisher's z, and the slope of the line through the pairs."""
    kept, answered = np.array(pairs).T
    r = float(np.corrcoef(kept, answered)[0, 1])
    z, error = np.arctanh(r), 1.96 / np.sqrt(len(pairs) - 3)
    return {
        "num_labels": len(pairs),
        "correlation": r,
        "low": float(np.tanh(z - error)),
        "high": float(np.tanh(z + error)),
        "slope": float(np.polyfit(kept, answered, 1)[0]),
    }


def main(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    cells: Annotated[
        list[Path] | None, typer.Option(help="Folders of cells.", show_default="continual, development")
    ] = None,
    out: Out = RESULTS / "kept_labels.json",
) -> None:
    """Write the figures of every cell of `deal` under today's training that keeps its answers to tasks with labels.

    Cells whose versions unlearned their preference for labels are left out.
    """
    lines: list[dict[str, Any]] = []
    for cell, line in todays_cells(cells):
        settings = cell["settings"]
        if settings["strategy"] != "deal" or settings["train"].get("recentre_steps"):
            continue
        if pairs := [*pairs_of(cell, data)]:
            lines.append({**line, **figures(pairs)})
    write_result(out, {"cells": lines})


if __name__ == "__main__":
    typer.run(main)
