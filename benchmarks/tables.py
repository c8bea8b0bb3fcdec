"""The tables of the stored cells: which tasks measure something, and every method's figures on these tasks.

A new cell and an old one are read alike. `benchmarks.continual.summary` has the figures of `benchmarks.compare`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any

from benchmarks.continual import summary
from benchmarks.continual.cell import BOUNDS
from benchmarks.continual.summary import (
    KEPT_BY_BOUNDS,
    OURS,
    CellJson,
    accuracy,
    accuracy_by_task,
    average_accuracy,
    figures,
    final_scores,
    in_percent,
    interval_over_rows,
    method_name,
    of_orders,
    orders_of,
    paired,
    row_scores,
)
from deal_core.evaluation.accuracy_matrix import mean_of_all

JUDGED = ("yelp", "amazon", "IMDB", "SST-2", "dbpedia", "agnews", "yahoo")
"""The tasks whose own adapter beats the majority class and the base model."""
EARLIER_DEFAULTS = ("memory tests", "memory none")
"""What stored cells of `deal` say that were made before it kept rows by default, the first default first."""
KEPT_BY_OTHERS = {
    "frozen_head": "a head per task",
    "knn": "all rows",
    "knn_means": "a mean per label",
    "joint_memory": "a tenth of the rows",
}
"""Bounds that the benchmark had: classifiers per task on features of the untouched base model, and an adapter for a
tenth of the rows together. `benchmarks.method.heads` has the classifiers."""
ALL_BOUNDS = (*BOUNDS, *KEPT_BY_OTHERS)
AFTER_TRAINING = ("recentre_steps",)
"""Settings of the training that are gone and count as a part of a method: cells with other values share a table."""
Z95 = 1.96


def departures(cell: CellJson) -> str:
    """As `summary.departures`, with the settings of AFTER_TRAINING."""
    train = cell["settings"]["train"]
    after = [f"train.{name} {value}" for name in AFTER_TRAINING if (value := train.get(name))]
    changes = summary.departures(cell).split(", revision ")
    return ", revision ".join([", ".join(filter(None, [changes[0], *after])), *changes[1:]])


def method_of(cell: CellJson) -> str:
    """The name of a cell's method."""
    return method_name(cell["settings"]["strategy"], departures(cell))


def compared_with(changes: Collection[str]) -> str:
    """Which of a table's cells of `deal`, by what `departures` says of them, the other cells are compared with."""
    return next((name for name in ("", *EARLIER_DEFAULTS) if name in changes), "")


def judged_tasks(protocol: Protocol) -> list[str]:
    """The tasks of a table that measure something.

    Without cells of the bounds, they are JUDGED, which earlier settings lifted; without any of these, all tasks.
    """
    some = next(iter((*protocol.cells, *protocol.joint)))
    tasks = sorted(some["settings"]["tasks"])
    return protocol.lifted_tasks() or [name for name in tasks if name in JUDGED] or tasks


def joint_of(protocol: Protocol) -> list[CellJson]:
    """The cells of retraining on all rows, without steps that re-centre."""
    return [cell for cell in protocol.joint if not cell["settings"]["train"].get("recentre_steps")]


def round_alike(cell: CellJson, other: CellJson) -> bool:
    """Whether the base model has one perplexity in both cells. It differs where sums of bf16 products round otherwise.

    Two trainings that do not round alike differ as with two seeds.
    """
    first, second = (side["perplexity"].get("base") for side in (cell, other))
    return first is not None and second is not None and f"{first:.3f}" == f"{second:.3f}"


def matched(cells: Iterable[CellJson], others: Sequence[CellJson]) -> list[tuple[CellJson, CellJson]]:
    """Return the pairs of two arms: cells with the same rows, seed, order and kind of processor.

    A bound learns all tasks together, so it makes a pair with every order of them.
    """

    def is_pair(cell: CellJson, other: CellJson) -> bool:
        first, second = cell["settings"], other["settings"]
        has_order = not {first["strategy"], second["strategy"]} & {*ALL_BOUNDS}
        return (
            all(first[name] == second[name] for name in ("seed", "data", "rows", "part"))
            and (first["tasks"] == second["tasks"] if has_order else {*first["tasks"]} == {*second["tasks"]})
            and round_alike(cell, other)
        )

    return [(cell, other) for cell in cells for other in others if is_pair(cell, other)]


def lost_since_learned(cell: CellJson, tasks: Collection[str]) -> float | None:
    """Accuracy right after a task was learned minus that in the end, in points, mean over these tasks but the newest.

    None: the cell is a bound's, or only its last version was scored.
    """
    settings, final = cell["settings"], final_scores(cell)
    if settings["strategy"] in ALL_BOUNDS or settings["scored"] == "last":
        return None
    learned = zip(settings["tasks"][:-1], cell["versions"], strict=False)
    return in_percent(
        accuracy(version["scores"][name]) - accuracy(final[name]) for name, version in learned if name in tasks
    )


@dataclass(frozen=True, kw_only=True)
class Lift:
    """Scores of one task, 0 to 1."""

    base: float
    """Of the base model."""
    majority: float
    """Of the commonest right answer, given to every row."""
    alone: float
    """Of an adapter that learned only this task, mean over seeds."""
    error: float
    """Half the width of the 95 % interval of `alone` over test rows."""

    def is_above(self, score: float) -> bool:
        """Whether the adapter is better, with 95 % confidence."""
        return self.alone - self.error > score


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The cells of a table (`summary.Table`) by what they are."""

    suite: str
    key: str
    base: CellJson | None
    per_task: tuple[CellJson, ...]
    joint: tuple[CellJson, ...]
    others: tuple[CellJson, ...]
    """The cells of the bounds that are neither `base`, `per_task` nor `joint`."""
    cells: tuple[CellJson, ...]
    """The strategies' cells."""

    def lifts(self) -> dict[str, Lift]:
        """What an adapter of its own brings each task. The dict is empty if the bounds were not run."""
        if self.base is None or not self.per_task:
            return {}
        alone, lifts = [final_scores(cell) for cell in self.per_task], {}
        for name, score in final_scores(self.base).items():
            spread = fmean(pvariance(row_scores(scores[name])) for scores in alone)
            lifts[name] = Lift(
                base=accuracy(score),
                majority=score["majority_rate"],
                alone=fmean(accuracy(scores[name]) for scores in alone),
                error=Z95 * math.sqrt(spread / len(score["correct"])),
            )
        return lifts

    def lifted(self) -> dict[str, bool]:
        """By task, whether its own adapter beats the majority class and the base model; see `lifts`.

        Other tasks measure nothing here.
        """
        return {name: lift.is_above(max(lift.base, lift.majority)) for name, lift in self.lifts().items()}

    def lifted_tasks(self) -> list[str]:
        """The tasks that measure something; empty if the bounds were not run."""
        return [name for name, is_lifted in self.lifted().items() if is_lifted]


def protocols(cells: Iterable[CellJson]) -> list[Protocol]:
    """Group cells into tables with the same suite, rows, test rows, adapter shape, training, base and prompts."""
    protocols = []
    for suite, key, group in summary.tables(cells, ("seed", *AFTER_TRAINING)):
        by: dict[str, list[CellJson]] = defaultdict(list)
        for cell in group:
            by[cell["settings"]["strategy"]].append(cell)
        protocols.append(
            Protocol(
                suite=suite,
                key=key,
                base=by["base"][0] if by["base"] else None,
                per_task=tuple(by["per_task"]),
                joint=tuple(by["joint"]),
                others=tuple(cell for name in KEPT_BY_OTHERS for cell in by[name]),
                cells=tuple(cell for name, of_strategy in by.items() if name not in ALL_BOUNDS for cell in of_strategy),
            )
        )
    return protocols


def summarise(protocol: Protocol, judged: Collection[str] | None = None) -> list[dict[str, Any]]:
    """One dict per strategy, settings and order. With several orders, a dict over all orders comes first.

    `judged` names the tasks that measure something; None: the lifted tasks.
    """
    judged = protocol.lifted_tasks() if judged is None else judged
    groups = _by_method(protocol.cells)
    ours = groups.get((OURS, compared_with({changes for strategy, changes in groups if strategy == OURS})), [])
    rows = []
    for (strategy, changes), group in groups.items():
        for chosen in orders_of(group):
            cells = of_orders(group, chosen)
            row = {"strategy": strategy, "changes": changes, "orders": chosen, **_figures(protocol, cells, judged)}
            rows.append(row if group is ours else row | _difference(cells, of_orders(ours, chosen), judged))
    rows.sort(key=lambda row: (-len(row["orders"]), row["orders"], row["strategy"], row["changes"]))
    bounds = _by_method(
        (*([protocol.base] if protocol.base else []), *protocol.others, *protocol.per_task, *protocol.joint)
    )
    return [
        *(
            {
                "strategy": name,
                "changes": changes,
                "orders": ["any"],
                **_figures(protocol, cells, judged),
                "stores": (KEPT_BY_BOUNDS | KEPT_BY_OTHERS)[name],
            }
            for (name, changes), cells in bounds.items()
        ),
        *rows,
    ]


def _by_method(cells: Iterable[CellJson]) -> dict[tuple[str, str], list[CellJson]]:
    """Cells by strategy and departures."""
    groups: dict[tuple[str, str], list[CellJson]] = defaultdict(list)
    for cell in cells:
        groups[cell["settings"]["strategy"], departures(cell)].append(cell)
    return groups


def _figures(protocol: Protocol, cells: Sequence[CellJson], judged: Collection[str]) -> dict[str, Any]:
    finals = [final_scores(cell) for cell in cells]
    perplexities = [cell["perplexity"] for cell in cells]
    return {
        **figures(cells, protocol.base),
        "average_accuracy_judged": in_percent(accuracy(final[name]) for final in finals for name in judged),
        "majority_judged": in_percent(final[name]["majority_rate"] for final in finals for name in judged),
        "lost_judged": mean_of_all(lost_since_learned(cell, judged) for cell in cells),
        "base_perplexities": sorted({f"{each['base']:.3f}" for each in perplexities if each.get("base")}),
    }


def _difference(cells: Sequence[CellJson], ours: Sequence[CellJson], judged: Collection[str]) -> dict[str, Any]:
    """Points of AA by which cells beat the default `deal` on the same rows, over their common orders and seeds.

    The result has the mean, the figures by order and seed, over the judged tasks, and without the most decisive task.
    It says whether the cells of each pair round alike, as on one kind of processor.
    """
    pairs = paired(cells, ours)
    if not pairs:
        return {}
    theirs, partners = zip(*pairs.values(), strict=True)

    def interval(tasks: Collection[str]) -> list[float]:
        return [*interval_over_rows(theirs, partners, tasks).in_points().values()]

    before = accuracy_by_task(partners)
    by_task = {name: value - before[name] for name, value in accuracy_by_task(theirs).items()}
    sign = 1 if sum(by_task.values()) > 0 else -1
    heaviest = max(by_task, key=lambda name: sign * by_task[name])
    difference: dict[str, Any] = {
        "difference_points_ci95": interval(by_task),
        "difference_num_cells": len(pairs),
        "difference_is_of_one_processor": all(map(round_alike, theirs, partners)),
        "difference_points_by_cell": {
            f"order {order}, seed {seed}": average_accuracy(cell) - average_accuracy(partner)
            for (order, seed), (cell, partner) in pairs.items()
        },
    }
    if judged:
        difference["difference_judged_points_ci95"] = interval(judged)
    if others := by_task.keys() - {heaviest}:
        difference |= {"heaviest_task": heaviest, "difference_without_it_points_ci95": interval(others)}
    return difference
