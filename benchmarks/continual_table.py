"""From cells to figures: AA, forgetting, and the paired difference of each strategy to SeqLoRA."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from deal_core.metrics import AccuracyMatrix, paired_interval

BASELINE = "seq_lora"


def matrix_of(cell: dict[str, Any]) -> AccuracyMatrix:
    """The accuracy matrix of a cell that was scored after every task."""
    matrix = AccuracyMatrix()
    for name, scores in zip(cell["tasks"], cell["correct"], strict=True):
        shares = {task: bits.count("1") / len(bits) for task, bits in scores.items()}
        matrix = matrix.with_row(name, shares, base_accuracy=None, parent_accuracy=None)
    return matrix


def write_summary(folder: Path) -> None:
    """Write summary.json and summary.md beside the cells of a folder."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*-*.json"))]
    cells = [cell for cell in cells if not cell["settings"]["last_only"]]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[cell["settings"]["strategy"], cell["settings"]["order"]].append(cell)
    strategies = sorted({strategy for strategy, _ in groups})
    orders = sorted({order for _, order in groups})
    results = [_row(groups, strategy, (order,)) for strategy in strategies for order in orders]
    results += [_row(groups, strategy, tuple(orders)) for strategy in strategies if len(orders) > 1]
    results = [row for row in results if row["num_cells"]]
    (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "summary.md").write_text(_markdown(results))


def _row(groups: dict[tuple[str, str], list[dict[str, Any]]], strategy: str, orders: tuple[str, ...]) -> dict[str, Any]:
    """One line of the table. The mean over several orders weighs each order alike."""
    cells = [cell for order in orders for cell in groups[strategy, order]]
    rivals = [cell for order in orders for cell in groups[BASELINE, order]]
    matrices = [matrix_of(cell) for cell in cells]
    row: dict[str, Any] = {
        "strategy": strategy,
        "orders": list(orders),
        "num_cells": len(cells),
        "average_accuracy": _mean([100 * (m.average_accuracy or 0) for m in matrices]),
        "by_seed": [round(100 * (m.average_accuracy or 0), 2) for m in matrices],
        "forgetting": _mean([100 * (m.forgetting or 0) for m in matrices]),
        "train_seconds": _mean([cell["seconds"]["train"] for cell in cells]),
        "evaluate_seconds": _mean([cell["seconds"]["evaluate"] for cell in cells]),
    }
    if strategy != BASELINE and cells and _seeds(cells) == _seeds(rivals):
        interval = paired_interval(_correct_per_row(cells), _correct_per_row(rivals))
        row["difference"] = [100 * interval.mean, 100 * interval.low, 100 * interval.high]
    return row


def _seeds(cells: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return sorted((cell["settings"]["order"], cell["settings"]["seed"]) for cell in cells)


def _correct_per_row(cells: list[dict[str, Any]]) -> list[float]:
    """For every (order, task, test row) the share of seeds whose final model is right: the unit that is resampled."""
    shares: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for cell in cells:
        for task, bits in cell["correct"][-1].items():
            for i, bit in enumerate(bits):
                shares[cell["settings"]["order"], task, i].append(int(bit))
    return [sum(values) / len(values) for _, values in sorted(shares.items())]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| strategy | orders | cells | AA | AA by cell | forgetting | AA minus seq_lora (95 % CI) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        difference = row.get("difference")
        shown = "" if difference is None else f"{difference[0]:+.1f} ({difference[1]:+.1f} to {difference[2]:+.1f})"
        by_seed = ", ".join(f"{value:.1f}" for value in row["by_seed"])
        lines.append(
            f"| {row['strategy']} | {' and '.join(row['orders'])} | {row['num_cells']} | {row['average_accuracy']:.1f} "
            f"| {by_seed} | {row['forgetting']:.1f} | {shown} |"
        )
    lines += [
        "",
        "AA and forgetting in points, means over cells (orders × seeds). The interval is a paired bootstrap over test",
        "rows, given these seeds.",
        "",
    ]
    return "\n".join(lines)
