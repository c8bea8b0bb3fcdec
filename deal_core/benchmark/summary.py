"""From cells to figures: one line per strategy and order of tasks, compared with `deal` on the same rows."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, pvariance
from typing import Any, get_args

from deal_core.benchmark.cell import BOUNDS, COMMON, SCHEMA_VERSION, Scored, revision_of, settings_read
from deal_core.benchmark.suites import name_of
from deal_core.errors import DataValidationError
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix, PairedInterval, mean_of_all, paired_interval
from deal_core.method_config import MethodConfig
from deal_core.schema_version import require_schema_version
from deal_core.strategies import PLUGINS

OURS = "deal"
EARLIER_DEFAULTS = ("memory tests", "memory none")
"""What stored cells of `deal` say that were made before it kept rows by default, the first default first."""
KEPT_BY_BOUNDS = {
    "base": None,
    "frozen_head": "a head per task",
    "knn": "all rows",
    "knn_means": "a mean per label",
    "per_task": "an adapter per task",
    "joint_memory": "a tenth of the rows",
    "joint": "all rows",
}
AFTER_TRAINING = ("recentre_steps",)
"""Training settings that count as a part of a method: cells with other values share a table."""
OTHER_BOUNDS = [name for name in BOUNDS if name not in ("base", "per_task", "joint")]
CellJson = Mapping[str, Any]
Scores = Mapping[str, Mapping[str, Any]]
Z95 = 1.96


def read_cells(folder: Path) -> list[CellJson]:
    """Read every cell of a folder.

    Raises:
        DataValidationError: A cell has another schema version.
    """
    cells = []
    for path in sorted(folder.glob("*-*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        require_schema_version(
            cell["settings"], SCHEMA_VERSION, str(path), DataValidationError, "move it away and run its cell again"
        )
        cells.append(cell)
    return cells


def final_scores(cell: CellJson) -> Scores:
    """Scores of every task at the end. With an adapter per task, each adapter is scored on its own task."""
    versions = cell["versions"]
    if cell["settings"]["strategy"] == "per_task":
        return {name: score for version in versions for name, score in version["scores"].items()}
    return dict(versions[-1]["scores"])


def row_scores(score: Mapping[str, Any]) -> list[float]:
    """The score of every test row, 0 to 1: one character per row for right and wrong answers, else a list."""
    return [float(row) for row in score["correct"]]


def accuracy(score: Mapping[str, Any]) -> float:
    """Mean score of a task's test rows; for labels, the share of right rows."""
    return fmean(row_scores(score))


def matrix_of(cell: CellJson, base: CellJson | None = None) -> AccuracyMatrix | None:
    """The accuracy matrix of a strategy's cell; None for a bound, or if only the last version was scored."""
    settings = cell["settings"]
    if settings["strategy"] in BOUNDS or settings["scored"] == "last":
        return None
    tasks, before = settings["tasks"], final_scores(base) if base else {}
    rows = [
        [accuracy(scores[name]) if name in scores else None for name in tasks]
        for scores in (version["scores"] for version in cell["versions"])
    ]
    untouched = tuple(accuracy(before[name]) if name in before else None for name in tasks)
    return AccuracyMatrix(tasks=tuple(tasks), trained=tuple(tasks), rows=tuple(map(tuple, rows)), base=untouched)


def lost_since_learned(cell: CellJson, tasks: Collection[str]) -> float | None:
    """Accuracy right after a task was learned minus that in the end, in points, mean over these tasks but the newest.

    None: the cell is a bound's, or only its last version was scored.
    """
    settings, final = cell["settings"], final_scores(cell)
    if settings["strategy"] in BOUNDS or settings["scored"] == "last":
        return None
    learned = zip(settings["tasks"][:-1], cell["versions"], strict=False)
    return _points(
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
    """The cells of one table, which share suite and settings, and their bounds."""

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
    groups: dict[tuple[str, str], list[CellJson]] = defaultdict(list)
    for cell in _most_scored(cells):
        settings = cell["settings"]
        train = {name: value for name, value in settings["train"].items() if name not in ("seed", *AFTER_TRAINING)}
        names = ("rows", "part", "max_test_rows", "scoring", "adapter", "base", "data", "prompt")
        key = json.dumps([*(settings[name] for name in names), train], sort_keys=True)
        groups[name_of(tuple(settings["tasks"]))[0], key].append(cell)
    tables = []
    for (suite, key), group in groups.items():
        by: dict[str, list[CellJson]] = defaultdict(list)
        for cell in group:
            by[cell["settings"]["strategy"]].append(cell)
        tables.append(
            Protocol(
                suite=suite,
                key=key,
                base=by["base"][0] if by["base"] else None,
                per_task=tuple(by["per_task"]),
                joint=tuple(by["joint"]),
                others=tuple(cell for name in OTHER_BOUNDS for cell in by[name]),
                cells=tuple(cell for name, of_strategy in by.items() if name not in BOUNDS for cell in of_strategy),
            )
        )
    return tables


def _most_scored(cells: Iterable[CellJson]) -> list[CellJson]:
    """Of cells that differ only in `scored`, keep the one with the most scores: their training is the same."""
    most: dict[str, CellJson] = {}
    for cell in sorted(cells, key=lambda cell: get_args(Scored).index(cell["settings"]["scored"])):
        key = json.dumps({name: value for name, value in cell["settings"].items() if name != "scored"}, sort_keys=True)
        most.setdefault(key, cell)
    return list(most.values())


def departures(cell: CellJson) -> str:
    """Describe a cell's settings that differ from today's defaults, and a past revision, for people.

    All settings of a strategy that is not installed are named: it has no defaults.
    """
    settings = cell["settings"]
    strategy, revision = settings["strategy"], settings.get("revision", 1)
    is_installed = strategy in PLUGINS.find()
    defaults: dict[str, Any] = {}
    if strategy not in BOUNDS:
        defaults = settings_read(strategy, MethodConfig()) if is_installed else {}
        # of a part that is off, a cell says nothing
        parts = {part: asdict(MethodConfig())[part] for part in COMMON}
        defaults |= {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        defaults = json.loads(json.dumps(defaults))  # as a cell has it: lists for tuples
    changes = [f"{name} {value}" for name, value in settings["method"].items() if value != defaults.get(name)]
    changes += [f"train.{name} {value}" for name in AFTER_TRAINING if (value := settings["train"].get(name))]
    if (is_installed or strategy in BOUNDS) and revision < revision_of(strategy):
        changes.append(f"revision {revision}")
    return ", ".join(changes)


def compared_with(changes: Collection[str]) -> str:
    """Which of a table's cells of `deal`, by what `departures` says of them, the other cells are compared with."""
    return next((name for name in ("", *EARLIER_DEFAULTS) if name in changes), "")


def method_name(strategy: str, changes: str) -> str:
    """A strategy, and in what it departs from the defaults."""
    return strategy + (f" ({changes})" if changes else "")


def method_of(cell: CellJson) -> str:
    """The name of a cell's method."""
    return method_name(cell["settings"]["strategy"], departures(cell))


def summarise(protocol: Protocol, judged: Collection[str] | None = None) -> list[dict[str, Any]]:
    """One dict per strategy, settings and order. With several orders, a dict over all orders comes first.

    `judged` names the tasks that measure something; None: the lifted tasks.
    """
    judged = protocol.lifted_tasks() if judged is None else judged
    groups = _by_method(protocol.cells)
    ours = groups.get((OURS, compared_with({changes for strategy, changes in groups if strategy == OURS})), [])
    rows = []
    for (strategy, changes), group in groups.items():
        orders = sorted({order_of(cell) for cell in group})
        for chosen in [*([order] for order in orders), *([orders] if len(orders) > 1 else [])]:
            cells = _of(group, chosen)
            row = {"strategy": strategy, "changes": changes, "orders": chosen, **_figures(protocol, cells, judged)}
            rows.append(row if group is ours else row | _difference(cells, _of(ours, chosen), judged))
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
                "stores": KEPT_BY_BOUNDS[name],
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


def order_of(cell: CellJson) -> str:
    """The suite's name of the order of the cell's tasks."""
    return name_of(tuple(cell["settings"]["tasks"]))[1]


def _of(cells: Sequence[CellJson], orders: Sequence[str]) -> list[CellJson]:
    return [cell for cell in cells if order_of(cell) in orders]


def _figures(protocol: Protocol, cells: Sequence[CellJson], judged: Collection[str]) -> dict[str, Any]:
    """Means over cells, shares in percent; None if a figure is undefined or was not measured."""
    finals = [final_scores(cell) for cell in cells]
    matrices = [matrix_of(cell, protocol.base) for cell in cells]
    by_cell = [_average_accuracy(cell) for cell in cells]
    perplexities = [cell["perplexity"] for cell in cells]
    learned = [version for cell in cells for version in cell["versions"] if "rows_per_second" in version]
    minutes = [sum(sum(v["seconds"].values()) for v in cell["versions"] if "seconds" in v) / 60 for cell in cells]
    sizes = [version["adapter_bytes"] for version in cells[0]["versions"] if "adapter_bytes" in version]
    is_per_task = cells[0]["settings"]["strategy"] == "per_task"
    return {
        "seeds": sorted({cell["settings"]["seed"] for cell in cells}),
        "num_cells": len(cells),
        "average_accuracy": _mean(by_cell),
        "average_accuracy_by_cell": by_cell,
        "average_accuracy_judged": _points(accuracy(final[name]) for final in finals for name in judged),
        "majority_judged": _points(final[name]["majority_rate"] for final in finals for name in judged),
        "lost_judged": mean_of_all(lost_since_learned(cell, judged) for cell in cells),
        "accuracy_by_task": _accuracy_by_task(cells),
        **{
            name: _points(getattr(matrix, name) if matrix else None for matrix in matrices)
            for name in ("forgetting", "backward_transfer", "forward_transfer")
        },
        "rouge1": _points(score["rouge1"] for final in finals for score in final.values()),
        "perplexity_ratio": mean_of_all(
            each["adapted"] / each["base"] if each.get("base") and each.get("adapted") else None
            for each in perplexities
        ),
        "base_perplexities": sorted({f"{each['base']:.3f}" for each in perplexities if each.get("base")}),
        "rows_per_second": median(version["rows_per_second"] for version in learned) if learned else None,
        # after the first and the last version; an adapter per task takes their sum
        "adapter_bytes": [sizes[0], sum(sizes) if is_per_task else sizes[-1]] if sizes else None,
        "stores": cells[0].get("stores"),
        "state_bytes": max((cell.get("state_bytes") or 0 for cell in cells), default=0),
        "minutes": _mean(minutes) if learned else None,
    }


def _difference(cells: Sequence[CellJson], ours: Sequence[CellJson], judged: Collection[str]) -> dict[str, Any]:
    """Points of AA by which cells beat the default `deal` on the same rows, over their common orders and seeds.

    The result has the mean, the figures by order and seed, over the judged tasks, and without the most decisive task.
    It says whether the cells of each pair round alike, as on one kind of processor.
    """
    theirs, partners = ({(order_of(cell), cell["settings"]["seed"]): cell for cell in side} for side in (cells, ours))
    pairs = sorted(theirs.keys() & partners.keys())
    if not pairs:
        return {}
    cells, ours = [theirs[pair] for pair in pairs], [partners[pair] for pair in pairs]

    def interval(tasks: Collection[str]) -> list[float]:
        return [*interval_over_rows(cells, ours, tasks).in_points().values()]

    before = _accuracy_by_task(ours)
    by_task = {name: value - before[name] for name, value in _accuracy_by_task(cells).items()}
    sign = 1 if sum(by_task.values()) > 0 else -1
    heaviest = max(by_task, key=lambda name: sign * by_task[name])
    difference: dict[str, Any] = {
        "difference_points_ci95": interval(by_task),
        "difference_num_cells": len(pairs),
        "difference_is_of_one_processor": all(map(round_alike, cells, ours)),
        "difference_points_by_cell": {
            f"order {order}, seed {seed}": _average_accuracy(cell) - _average_accuracy(partner)
            for (order, seed), cell, partner in zip(pairs, cells, ours, strict=True)
        },
    }
    if judged:
        difference["difference_judged_points_ci95"] = interval(judged)
    if others := by_task.keys() - {heaviest}:
        difference |= {"heaviest_task": heaviest, "difference_without_it_points_ci95": interval(others)}
    return difference


def round_alike(cell: CellJson, other: CellJson) -> bool:
    """Whether the base model has one perplexity in both cells. It differs where sums of bf16 products round otherwise.

    Two trainings that do not round alike differ as with two seeds.
    """
    first, second = (side["perplexity"].get("base") for side in (cell, other))
    return first is not None and second is not None and f"{first:.3f}" == f"{second:.3f}"


def _average_accuracy(cell: CellJson) -> float:
    """AA of a cell in percent."""
    return 100 * _mean(accuracy(score) for score in final_scores(cell).values())


def _accuracy_by_task(cells: Sequence[CellJson]) -> dict[str, float]:
    """Per task, the mean accuracy over cells at the end, in percent."""
    finals = [final_scores(cell) for cell in cells]
    return {name: 100 * _mean(accuracy(final[name]) for final in finals) for name in finals[0]}


def interval_over_rows(
    cells: Sequence[CellJson], others: Sequence[CellJson], tasks: Collection[str] | None = None
) -> PairedInterval:
    """The mean accuracy of cells at the end minus that of others, with its interval over the test rows of each task.

    A row in several orders and seeds is one unit, because its answers are not independent. None stands for all tasks.
    """
    first, second = _score_per_row(cells, tasks), _score_per_row(others, tasks)
    flat = [[score for _, scores in sorted(side.items()) for score in scores] for side in (first, second)]
    return paired_interval(*flat, strata=[len(scores) for _, scores in sorted(first.items())])


def _score_per_row(cells: Sequence[CellJson], tasks: Collection[str] | None) -> dict[str, list[float]]:
    """For every test row of these tasks, the mean score over the cells at the end, by task; None stands for all."""
    scores: dict[str, list[list[float]]] = defaultdict(list)
    for cell in cells:
        for name, score in final_scores(cell).items():
            if tasks is None or name in tasks:
                scores[name].append(row_scores(score))
    return {name: [_mean(row) for row in zip(*by_cell, strict=True)] for name, by_cell in scores.items()}


def _mean(values: Iterable[float]) -> float:
    """The mean as `sum` gives it: stored pages have its rounding, which is not that of fmean."""
    values = list(values)
    return sum(values) / len(values)


def _points(shares: Iterable[float | None]) -> float | None:
    """The mean of shares in percent; None as for `mean_of_all`."""
    mean = mean_of_all(shares)
    return None if mean is None else 100 * mean
