"""From cells to figures: AA, forgetting, and the paired difference of each strategy to SeqLoRA."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deal_core.config import MethodConfig
from deal_core.metrics import AccuracyMatrix, paired_interval

BASELINE = "seq_lora"
CellJson = dict[str, Any]


def matrix_of(cell: CellJson) -> AccuracyMatrix:
    """The accuracy matrix of a cell that was scored after every task."""
    matrix = AccuracyMatrix()
    for name, scores in zip(cell["settings"]["tasks"], cell["correct"], strict=True):
        shares = {task: bits.count("1") / len(bits) for task, bits in scores.items()}
        matrix = matrix.with_row(name, shares, base_accuracy=None, parent_accuracy=None)
    return matrix


def write_summary(folder: Path) -> None:
    """Write summary.json and summary.md beside the cells of a folder: a row per strategy, settings and order."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != "summary.json"]
    groups: dict[str, list[CellJson]] = defaultdict(list)
    for cell in cells:
        if not cell["settings"]["last_only"]:
            groups[_variant(cell)].append(cell)
    baselines = {_protocol(cell): group for group in groups.values() for cell in group if _strategy(cell) == BASELINE}
    results = []
    for group in groups.values():
        orders = sorted({cell["settings"]["order"] for cell in group})
        for chosen in [*([order] for order in orders), *([orders] if len(orders) > 1 else [])]:
            rivals = baselines.get(_protocol(group[0]), [])
            results.append(_row(_of(group, chosen), _of(rivals, chosen), chosen))
    (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "summary.md").write_text(_markdown(results))


def _strategy(cell: CellJson) -> str:
    return str(cell["settings"]["strategy"])


def _variant(cell: CellJson) -> str:
    """Cells that differ in order and seed alone belong together."""
    return json.dumps([_strategy(cell), cell["settings"]["method"], _protocol(cell)])


def _name(row: dict[str, Any]) -> str:
    """The strategy, and the settings in which it departs from the defaults of today."""
    today = json.loads(json.dumps(asdict(MethodConfig())))
    changes = [
        f"{part}.{field} {value}"
        for part, values in (row["method"] or {}).items()
        for field, value in values.items()
        if value != today.get(part, {}).get(field)
    ]
    return row["strategy"] + (f" ({', '.join(changes)})" if changes else "")


def _protocol(cell: CellJson) -> str:
    """What two strategies must share to be compared."""
    settings = cell["settings"]
    train = {name: value for name, value in settings["train"].items() if name != "seed"}
    return json.dumps([settings["rows"], settings["test_rows"], settings["adapter"], train, settings["base"]])


def _of(cells: list[CellJson], orders: list[str]) -> list[CellJson]:
    return [cell for cell in cells if cell["settings"]["order"] in orders]


def _row(cells: list[CellJson], rivals: list[CellJson], orders: list[str]) -> dict[str, Any]:
    """One line of the table. The mean over several orders weighs each cell alike."""
    matrices = [matrix_of(cell) for cell in cells]
    accuracies = [100 * (matrix.average_accuracy or 0) for matrix in matrices]
    forgetting = [100 * (matrix.forgetting or 0) for matrix in matrices]
    row: dict[str, Any] = {
        "strategy": _strategy(cells[0]),
        "method": cells[0]["settings"]["method"],
        "orders": orders,
        "num_cells": len(cells),
        "average_accuracy": sum(accuracies) / len(cells),
        "average_accuracy_by_cell": accuracies,
        "forgetting": sum(forgetting) / len(cells),
        "forgetting_by_cell": forgetting,
    }
    keys = sorted(map(_key, cells))
    pairs = [rival for rival in rivals if _key(rival) in keys]
    if _strategy(cells[0]) != BASELINE and sorted(map(_key, pairs)) == keys:
        interval = paired_interval(_right_per_row(cells), _right_per_row(pairs))
        row["difference_points_ci95"] = [100 * interval.mean, 100 * interval.low, 100 * interval.high]
    return row


def _key(cell: CellJson) -> tuple[str, int, str]:
    """What two cells must share to be paired."""
    return cell["settings"]["order"], cell["settings"]["seed"], cell["settings"]["data"]


def _right_per_row(cells: list[CellJson]) -> list[float]:
    """For every test row of every task the share of cells whose final model is right: the unit that is resampled.

    A row that stands in several orders and seeds is one unit: its answers are not independent.
    """
    shares: dict[tuple[str, int], list[int]] = defaultdict(list)
    for cell in cells:
        for task, bits in cell["correct"][-1].items():
            for i, bit in enumerate(bits):
                shares[task, i].append(int(bit))
    return [sum(values) / len(values) for _, values in sorted(shares.items())]


def _markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| strategy | order | cells | AA | by cell | forgetting | by cell | AA minus seq_lora (95 % CI) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(results, key=lambda row: (row["orders"], _name(row))):
        difference = row.get("difference_points_ci95")
        shown = "" if difference is None else f"{difference[0]:+.1f} ({difference[1]:+.1f} to {difference[2]:+.1f})"
        lines.append(
            f"| {_name(row)} | {' and '.join(row['orders'])} | {row['num_cells']} "
            f"| {row['average_accuracy']:.1f} | {_list(row['average_accuracy_by_cell'])} "
            f"| {row['forgetting']:.1f} | {_list(row['forgetting_by_cell'])} | {shown} |"
        )
    lines += [
        "",
        "AA and forgetting in points, means over cells (order × seed). The difference is to the cells of seq_lora with",
        "the same orders and seeds, its interval a paired bootstrap over test rows, given these seeds.",
        "",
    ]
    return "\n".join(lines)


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)
