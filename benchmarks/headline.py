"""The headline: how near one adapter comes to training on all data at once, and what it loses and costs.

    python -m benchmarks.headline

It reads the stored cells and trains nothing. Every figure is of the judged tasks: those whose own adapter beats the
majority class and the base model. Without cells of these two bounds, they are JUDGED, which earlier settings lifted;
without any of these, all tasks. What is lost is the accuracy right after a task was learned minus that in the end; the
worst task is compared with its best. Cells of other training settings (LEARNING) are in tables of their own; a table
says whether its settings are today's defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, get_args

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from benchmarks.method.protocol import JUDGED, describe
from benchmarks.output import RESULTS
from benchmarks.stored_cells import FIXED, MEMORIES, NUM_TEXTS, Memory, name_of_memory, read_stored_cells
from benchmarks.tables import ALL_BOUNDS, Protocol, departures, lost_since_learned, protocols, round_alike
from deal_core.benchmark.cell import PROTOCOL
from deal_core.benchmark.summary import OURS, CellJson, accuracy, final_scores, matrix_of, order_of, row_scores
from deal_core.config import TrainConfig

CELLS = RESULTS / "continual"
STORED_SHARE = MEMORIES["rows"]["rehearsal.stored_share"]
"""Share of its rows that a task leaves in the memory."""
LEARNING = (
    "learning_rate",
    "schedule",
    "num_epochs",
    "min_steps",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "balance_labels",
)
OTHER_SETTINGS = ("part", "max_test_rows", "prompt", "scoring", "base", "adapter", "data")
PLAIN = {"prompt": "plain", "scoring": "generated"}
"""Settings that a title leaves out."""
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


def headline(cells: Sequence[CellJson]) -> dict[str, Any]:
    """Return the figures of every table, by suite, training rows per task and training settings."""
    tables: dict[str, Any] = {}
    todays = asdict(TrainConfig(**PROTOCOL)) | FIXED
    for protocol in protocols(cells):
        some = next(iter((*protocol.cells, *protocol.joint)), None)
        if some is None:
            continue
        settings, train = some["settings"], {name: some["settings"]["train"][name] for name in LEARNING}
        title = f"suite {protocol.suite}, {settings['rows']} rows, {describe(train)}"
        if title in tables:  # the rest of what tells protocols apart
            title += "".join(
                f", {name} {settings[name]}" for name in OTHER_SETTINGS if settings[name] != PLAIN.get(name)
            )
        tables[title] = {
            "part": settings["part"],
            "base": settings["base"],
            "judged_tasks": judged_tasks(protocol),
            "train": train,
            "is_default": train == {name: todays[name] for name in LEARNING},
            "arms": {name: _figures(protocol, arm) for name, arm in arms(protocol).items() if arm},
        }
    return {"schema_version": 4, "stored_share": STORED_SHARE, "tables": tables}


def judged_tasks(protocol: Protocol) -> list[str]:
    """The tasks that measure something."""
    some = next(iter((*protocol.cells, *protocol.joint)))
    tasks = sorted(some["settings"]["tasks"])
    return protocol.lifted_tasks() or [name for name in tasks if name in JUDGED] or tasks


def arms(protocol: Protocol) -> dict[str, list[CellJson]]:
    """The cells of each arm: retraining on all rows, ours with and without a memory, and the best rivals.

    A rival with several settings takes part with the best one. Cells whose versions unlearned their preference for
    labels, after their training, are arms of their own.
    """
    all_arms = {
        "joint": joint_of(protocol),
        "joint, a tenth of the rows": [cell for cell in protocol.others if _is(cell, "joint_memory")],
        "frozen features, a head per task": [cell for cell in protocol.others if _is(cell, "frozen_head")],
    }
    for is_recentred, suffix in ((False, ""), (True, ", re-centred")):
        cells = [cell for cell in protocol.cells if _is_recentred(cell) is is_recentred]
        all_arms |= {f"{name}{suffix}": arm for name, arm in _trained_arms(cells, judged_tasks(protocol)).items()}
    return all_arms


def joint_of(protocol: Protocol) -> list[CellJson]:
    """The cells of retraining on all rows, without steps that re-centre."""
    return [cell for cell in protocol.joint if not _is_recentred(cell)]


def _is_recentred(cell: CellJson) -> bool:
    return bool(cell["settings"]["train"].get("recentre_steps"))


def as_trained(cell: CellJson) -> CellJson:
    """A cell without what it says of its training, so that `departures` leaves out the steps that re-centre."""
    return {**cell, "settings": {**cell["settings"], "train": {}}}


def _trained_arms(cells: Sequence[CellJson], judged: Sequence[str]) -> dict[str, list[CellJson]]:
    groups: dict[tuple[str, str], list[CellJson]] = {}
    for cell in cells:
        groups.setdefault((cell["settings"]["strategy"], departures(as_trained(cell))), []).append(cell)

    def best(chosen: Callable[[CellJson], bool]) -> list[CellJson]:
        fitting = [group for group in groups.values() if chosen(group[0])]
        return max(fitting, key=lambda group: fmean(judged_accuracy(cell, judged) for cell in group), default=[])

    rival = best(lambda cell: cell["settings"]["strategy"] != OURS and cell.get("stores") == "nothing")
    name = rival[0]["settings"]["strategy"] if rival else "none"
    return {
        **{f"memory {memory}": groups.get((OURS, name_of_memory(memory)), []) for memory in get_args(Memory)},
        f"best rival that keeps no rows: {name}": rival,
        "replay, as many rows as memory rows": best(lambda cell: _replays(cell, STORED_SHARE)),
        "replay, as many rows as memory tests": best(lambda cell: _replays(cell, NUM_TEXTS / cell["settings"]["rows"])),
    }


def _is(cell: CellJson, strategy: str) -> bool:
    return bool(cell["settings"]["strategy"] == strategy)


def _replays(cell: CellJson, share: float) -> bool:
    return _is(cell, "replay") and round(cell["settings"]["method"].get("rehearsal.stored_share", 0.02), 2) == round(
        share, 2
    )


def judged_accuracy(cell: CellJson, judged: Sequence[str]) -> float:
    """Mean accuracy over the judged tasks at the end, in percent."""
    final = final_scores(cell)
    return 100 * fmean(accuracy(final[name]) for name in judged)


def _figures(protocol: Protocol, cells: Sequence[CellJson]) -> dict[str, Any]:
    judged = judged_tasks(protocol)
    by_cell = [judged_accuracy(cell, judged) for cell in cells]
    joint = {cell["settings"]["seed"]: cell for cell in joint_of(protocol)}
    pairs = [(cell, joint[cell["settings"]["seed"]]) for cell in cells if cell["settings"]["seed"] in joint]
    lost = [points for cell in cells if (points := lost_since_learned(cell, judged)) is not None]
    trained = [version["seconds"]["train"] for cell in cells for version in cell["versions"] if "seconds" in version]
    figures = {
        "num_cells": len(cells),
        "orders": sorted({order_of(cell) for cell in cells}),
        "seeds": sorted({cell["settings"]["seed"] for cell in cells}),
        "judged_accuracy": fmean(by_cell),
        "judged_accuracy_ci95_over_cells": t_interval(by_cell),
        "lost_since_learned": fmean(lost) if lost else None,
        "worst_task": worst_task(cells, judged),
        "seconds_per_training": fmean(trained) if trained else None,
        "adapter_bytes": cells[0]["versions"][-1].get("adapter_bytes"),
    }
    if pairs and cells[0]["settings"]["strategy"] not in ALL_BOUNDS:
        ratios = [judged_accuracy(cell, judged) / judged_accuracy(other, judged) for cell, other in pairs]
        figures |= {
            "ratio_to_joint": fmean(ratios),
            "ratio_to_joint_ci95_over_cells": t_interval(ratios),
            "ratio_to_joint_ci95_over_rows": bootstrap_ratio(pairs, judged),
            "ratio_is_of_one_processor": all(round_alike(*pair) for pair in pairs),
        }
    return figures


def worst_task(cells: Sequence[CellJson], judged: Sequence[str]) -> dict[str, Any] | None:
    """The judged task that lost most: accuracy at the end less the best measured one, in points, mean over cells."""
    losses: dict[str, list[float]] = {name: [] for name in judged}
    for cell in cells:
        matrix = matrix_of(cell)
        if matrix is None:
            continue
        for name, column in zip(matrix.tasks, zip(*matrix.rows, strict=True), strict=True):
            measured = [value for value in column[matrix.trained.index(name) :] if value is not None]
            if name in losses:
                losses[name].append(100 * (measured[-1] - max(measured)))
    means = {name: fmean(values) for name, values in losses.items() if values}
    if not means:
        return None
    worst = min(means, key=lambda name: means[name])
    return {"task": worst, "points": means[worst]}


def t_interval(values: Sequence[float]) -> list[float] | None:
    """The interval of Student's t around the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return [fmean(values) - half, fmean(values) + half]


def bootstrap_ratio(pairs: Sequence[tuple[CellJson, CellJson]], judged: Sequence[str]) -> list[float]:
    """The interval of (mean accuracy of the first) / (mean accuracy of the second) over resampled test rows.

    A row is one unit in all cells. Rows are drawn within their task, so every task keeps its weight.
    """
    generator = np.random.default_rng(0)
    tops, bottoms = np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for name in judged:
        # for every test row, the mean score over the cells at the end
        first, second = (
            np.array([row_scores(final_scores(cell)[name]) for cell in cells]).mean(0)
            for cells in zip(*pairs, strict=True)
        )
        drawn = generator.integers(0, len(first), (NUM_RESAMPLES, len(first)))
        tops += first[drawn].mean(1)
        bottoms += second[drawn].mean(1)
    low, high = np.quantile(tops / bottoms, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [float(low), float(high)]


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "cells": lambda arm: str(arm["num_cells"]),
    "judged, %": lambda arm: f"{arm['judged_accuracy']:.1f}",
    "of joint, %": lambda arm: f"{100 * arm['ratio_to_joint']:.1f}" if "ratio_to_joint" in arm else "–",
    "over rows": lambda arm: _percent_span(arm.get("ratio_to_joint_ci95_over_rows")),
    "over cells": lambda arm: _percent_span(arm.get("ratio_to_joint_ci95_over_cells")),
    "lost": lambda arm: "–" if (lost := arm["lost_since_learned"]) is None else f"{lost:.1f}",
    "worst task": lambda arm: "–" if (worst := arm["worst_task"]) is None else f"{worst['task']} {worst['points']:.1f}",
    "s a training": lambda arm: "–" if arm["seconds_per_training"] is None else f"{arm['seconds_per_training']:.0f}",
    "MB": lambda arm: "–" if arm["adapter_bytes"] is None else f"{arm['adapter_bytes'] / 1e6:.1f}",
}


def _percent_span(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """The figures for people, one table per suite."""
    for title, of_suite in found["tables"].items():
        table = Table(title=f"{title}, {of_suite['part']} rows: {', '.join(of_suite['judged_tasks'])}", box=None)
        for column in ("", *COLUMNS):
            table.add_column(column, justify="right" if column else "left")
        for name, arm in of_suite["arms"].items():
            table.add_row(name, *(show(arm) for show in COLUMNS.values()))
        yield table


def main(
    cells: Annotated[Path, typer.Option(help="Folder of the stored cells.")] = CELLS,
    people: Annotated[bool, typer.Option(help="Print tables for people to standard error too.")] = True,
) -> None:
    """Print the headline as one JSON object, and as tables for people."""
    found = headline(read_stored_cells(cells))
    typer.echo(json.dumps(found, indent=1))
    if people:
        console = Console(stderr=True, width=150)
        for table in tables(found):
            console.print(table)


if __name__ == "__main__":
    typer.run(main)
