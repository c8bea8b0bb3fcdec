"""From cells to figures: one line per strategy and order of tasks, compared with `deal` on the same rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, get_args

from benchmarks.continual.cell import BOUNDS, COMMON, SCHEMA_VERSION, Scored, revision_of, settings_read
from benchmarks.continual.paired import PairedInterval, paired_interval
from benchmarks.continual.suites import name_of
from deal_core.errors import DataValidationError
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix, mean_of_all
from deal_core.method_config import MethodConfig
from deal_core.schema_version import require_schema_version
from deal_core.strategies import PLUGINS

OURS = "deal"
KEPT_BY_BOUNDS = {"base": None, "per_task": "an adapter per task", "joint": "all rows"}
CellJson = Mapping[str, Any]
Scores = Mapping[str, Mapping[str, Any]]
JUDGED = ("yelp", "amazon", "IMDB", "SST-2", "dbpedia", "agnews", "yahoo")
"""The tasks of suites 9 and 15 whose own adapter beats the commonest answer and the base model."""


def read_cells(folder: Path, *, oldest: int = SCHEMA_VERSION) -> list[CellJson]:
    """Read every cell of a folder.

    Args:
        folder: The cells.
        oldest: Lowest schema version that is read. Version 2 has the same answers, and lacks some settings that had
            their default.

    Raises:
        DataValidationError: A cell has another schema version.
    """
    cells = []
    for path in sorted(folder.glob("*-*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["settings"].get("schema_version") not in range(oldest, SCHEMA_VERSION):
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
    is_bound = settings["strategy"] in BOUNDS or len(cell["versions"]) < len(settings["tasks"])
    if is_bound or settings["scored"] == "last":
        return None
    tasks, before = settings["tasks"], final_scores(base) if base else {}
    rows = [
        [accuracy(scores[name]) if name in scores else None for name in tasks]
        for scores in (version["scores"] for version in cell["versions"])
    ]
    untouched = tuple(accuracy(before[name]) if name in before else None for name in tasks)
    consolidated = [number for number, version in enumerate(cell["versions"]) if version.get("task", "") is None]
    trained = list(tasks)
    for number in consolidated:  # it learned all tasks so far
        trained.insert(number, trained[number - 1])
    return AccuracyMatrix(
        tasks=tuple(tasks),
        trained=tuple(trained),
        rows=tuple(map(tuple, rows)),
        base=untouched,
        consolidated=tuple(consolidated),
    )


class Table(NamedTuple):
    """The cells that can be compared: they share suite, rows, test rows, adapter shape, training, base and prompts."""

    suite: str
    key: str
    """What they share, as JSON."""
    cells: tuple[CellJson, ...]


def tables(cells: Iterable[CellJson]) -> list[Table]:
    """Group cells into tables. Cells that differ only in their seed share a table."""
    groups: dict[tuple[str, str], list[CellJson]] = defaultdict(list)
    for cell in _most_scored(cells):
        settings = cell["settings"]
        train = {name: value for name, value in settings["train"].items() if name != "seed"}
        names = ("rows", "part", "max_test_rows", "scoring", "adapter", "base", "data", "prompt")
        key = json.dumps([*(settings[name] for name in names), train], sort_keys=True)
        groups[name_of(tuple(settings["tasks"]))[0], key].append(cell)
    return [Table(suite, key, tuple(group)) for (suite, key), group in groups.items()]


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
    every = settings.get("consolidate_every")
    changes = [] if every is None else [f"consolidated every {every} tasks"]
    changes += [f"{name} {value}" for name, value in settings["method"].items() if value != defaults.get(name)]
    if (is_installed or strategy in BOUNDS) and revision < revision_of(strategy):
        changes.append(f"revision {revision}")
    return ", ".join(changes)


def method_name(strategy: str, changes: str) -> str:
    """A strategy, and in what it departs from the defaults."""
    return strategy + (f" ({changes})" if changes else "")


def summarise(table: Table) -> list[dict[str, Any]]:
    """One dict per strategy, settings and order, the bounds first. With several orders, a dict over all comes first."""
    groups: dict[tuple[str, str], list[CellJson]] = defaultdict(list)
    for cell in table.cells:
        groups[cell["settings"]["strategy"], departures(cell)].append(cell)
    base = next((cell for cell in table.cells if cell["settings"]["strategy"] == "base"), None)
    bounds, rows = [], []
    for (strategy, changes), group in groups.items():
        named = {"strategy": strategy, "changes": changes}
        if strategy in BOUNDS:
            bounds.append({**named, "orders": ["any"], **figures(group, base), "stores": KEPT_BY_BOUNDS[strategy]})
            continue
        for orders in orders_of(group):
            cells = of_orders(group, orders)
            ours = of_orders(groups.get((OURS, ""), []), orders)
            difference = {} if (strategy, changes) == (OURS, "") else _difference(cells, ours)
            rows.append({**named, "orders": orders, **figures(cells, base), **difference})
    bounds.sort(key=lambda row: BOUNDS.index(row["strategy"]))
    rows.sort(key=lambda row: (-len(row["orders"]), row["orders"], row["strategy"], row["changes"]))
    return [*bounds, *rows]


def orders_of(cells: Iterable[CellJson]) -> list[list[str]]:
    """Each order of the cells by itself, and all of them together if there are several."""
    orders = sorted({order_of(cell) for cell in cells})
    return [*([order] for order in orders), *([orders] if len(orders) > 1 else [])]


def order_of(cell: CellJson) -> str:
    """The suite's name of the order of the cell's tasks."""
    return name_of(tuple(cell["settings"]["tasks"]))[1]


def of_orders(cells: Sequence[CellJson], orders: Sequence[str]) -> list[CellJson]:
    """The cells whose tasks have one of these orders."""
    return [cell for cell in cells if order_of(cell) in orders]


def figures(cells: Sequence[CellJson], base: CellJson | None) -> dict[str, Any]:
    """Means over cells, shares in percent; None if a figure is undefined or was not measured."""
    finals = [final_scores(cell) for cell in cells]
    matrices = [matrix_of(cell, base) for cell in cells]
    perplexities = [cell["perplexity"] for cell in cells]
    learned = [version for cell in cells for version in cell["versions"] if "rows_per_second" in version]
    minutes = [sum(sum(v["seconds"].values()) for v in cell["versions"] if "seconds" in v) / 60 for cell in cells]
    sizes = [version["adapter_bytes"] for version in cells[0]["versions"] if "adapter_bytes" in version]
    is_per_task = cells[0]["settings"]["strategy"] == "per_task"
    return {
        "seeds": sorted({cell["settings"]["seed"] for cell in cells}),
        "num_cells": len(cells),
        "average_accuracy": mean(map(average_accuracy, cells)),
        "accuracy_by_task": accuracy_by_task(cells),
        **{
            name: in_percent(getattr(matrix, name) if matrix else None for matrix in matrices)
            for name in ("forgetting", "backward_transfer", "forward_transfer")
        },
        "rouge1": in_percent(score["rouge1"] for final in finals for score in final.values()),
        "perplexity_ratio": mean_of_all(
            each["adapted"] / each["base"] if each.get("base") and each.get("adapted") else None
            for each in perplexities
        ),
        "rows_per_second": median(version["rows_per_second"] for version in learned) if learned else None,
        # after the first and the last version; an adapter per task takes their sum
        "adapter_bytes": [sizes[0], sum(sizes) if is_per_task else sizes[-1]] if sizes else None,
        "stores": cells[0].get("stores"),
        "state_bytes": max((cell.get("state_bytes") or 0 for cell in cells), default=0),
        "minutes": mean(minutes) if learned else None,
    }


def _difference(cells: Sequence[CellJson], ours: Sequence[CellJson]) -> dict[str, Any]:
    pairs = paired(cells, ours)
    if not pairs:
        return {}
    interval = interval_over_rows(*zip(*pairs.values(), strict=True))
    return {"difference_points_ci95": [*interval.in_points().values()], "difference_num_cells": len(pairs)}


def paired(cells: Iterable[CellJson], others: Iterable[CellJson]) -> dict[tuple[str, int], tuple[CellJson, CellJson]]:
    """The cells of both sides that have a common order and seed, by these two."""
    sides = [{(order_of(cell), cell["settings"]["seed"]): cell for cell in side} for side in (cells, others)]
    return {place: (sides[0][place], sides[1][place]) for place in sorted(sides[0].keys() & sides[1].keys())}


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
        has_order = not {first["strategy"], second["strategy"]} & {*BOUNDS}
        return (
            all(first[name] == second[name] for name in ("seed", "data", "rows", "part"))
            and (first["tasks"] == second["tasks"] if has_order else {*first["tasks"]} == {*second["tasks"]})
            and round_alike(cell, other)
        )

    return [(cell, other) for cell in cells for other in others if is_pair(cell, other)]


def average_accuracy(cell: CellJson) -> float:
    """AA of a cell in percent."""
    return 100 * mean(accuracy(score) for score in final_scores(cell).values())


def accuracy_by_task(cells: Sequence[CellJson]) -> dict[str, float]:
    """Per task, the mean accuracy over cells at the end, in percent."""
    finals = [final_scores(cell) for cell in cells]
    return {name: 100 * mean(accuracy(final[name]) for final in finals) for name in finals[0]}


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
    return {name: [mean(row) for row in zip(*by_cell, strict=True)] for name, by_cell in scores.items()}


def mean(values: Iterable[float]) -> float:
    """The mean as `sum` gives it: stored pages have its rounding, which is not that of fmean."""
    values = list(values)
    return sum(values) / len(values)


def in_percent(shares: Iterable[float | None]) -> float | None:
    """The mean of shares in percent; None as for `mean_of_all`."""
    share = mean_of_all(shares)
    return None if share is None else 100 * share
