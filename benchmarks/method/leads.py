"""What the pages say of one suite's reported cells: the lead of a method over another, and what each kind of task kept.

`python -m benchmarks.report` prints both.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.continual.summary import CellJson, accuracy, final_scores, interval_over_rows, order_of
from benchmarks.tables import Protocol, joint_of, judged_tasks, method_of, round_alike

KINDS = {"topics": ("dbpedia", "agnews", "yahoo"), "sentiments": ("IMDB", "SST-2"), "stars": ("yelp", "amazon")}
"""Kind → the judged tasks of suite 15 that are of this kind."""


def cells_of(protocol: Protocol, method: str) -> dict[tuple[str, int], CellJson]:
    """The cells of a method, by order and seed."""
    cells = [cell for cell in protocol.cells if method_of(cell) == method]
    return {(order_of(cell), cell["settings"]["seed"]): cell for cell in cells}


def lead(protocol: Protocol, first: str, second: str) -> dict[str, Any] | None:
    """The accuracy of one method minus that of another on the judged tasks, in points; None without a common cell."""
    ours, theirs = cells_of(protocol, first), cells_of(protocol, second)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    pair = [[cells[place] for place in common] for cells in (ours, theirs)]
    return {
        "suite": protocol.suite,
        "first": first,
        "second": second,
        "num_cells": len(common),
        "is_of_one_processor": all(map(round_alike, *pair)),
        **interval_over_rows(pair[0], pair[1], judged_tasks(protocol)).in_points(),
    }


def points_of(cells: Sequence[CellJson]) -> dict[str, tuple[float, float]]:
    """Per task the mean accuracy over cells right after it was learned, and in the end."""
    points = {}
    for task in cells[0]["settings"]["tasks"]:
        after = [cell["versions"][cell["settings"]["tasks"].index(task)]["scores"] for cell in cells]
        learned = [accuracy(scores[task]) for scores in after if task in scores]
        kept = [accuracy(final_scores(cell)[task]) for cell in cells]
        if len(learned) == len(kept):
            points[task] = (100 * sum(learned) / len(learned), 100 * sum(kept) / len(kept))
    return points


def by_kind(protocol: Protocol) -> list[dict[str, Any]]:
    """One line per method: by kind the mean accuracy right after learning and in the end. `joint`: the end alone."""
    lines: list[dict[str, Any]] = []
    for method in sorted({method_of(cell) for cell in protocol.cells}):
        points = points_of([*cells_of(protocol, method).values()])
        means = {kind: tuple(fmean(points[task][i] for task in tasks) for i in (0, 1)) for kind, tasks in KINDS.items()}
        lines.append({"method": method, **means})
    finals = [final_scores(cell) for cell in joint_of(protocol)]
    of_joint = {
        kind: (None, 100 * fmean(accuracy(final[task]) for final in finals for task in tasks))
        for kind, tasks in KINDS.items()
    }
    return [*lines, {"method": "joint", **of_joint}]
