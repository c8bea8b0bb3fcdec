"""Write benchmarks/data_efficiency.md: every option against random rows and against all rows.

    python -m benchmarks.data_efficiency

The figures come from development cells that differ in nothing but the option. A difference is that of the mean
accuracy in the end, in points, with a 95 % bootstrap interval over test rows. The rule, written before the first of
these cells: a gain is shown if the interval is above 0 in a first cell, and the mean of four cells is too, three of
them ahead. An option whose first cell is not ahead gets no further cells.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.continual.cell import COMMON
from benchmarks.continual.paired import paired_interval
from benchmarks.continual.suites import name_of
from benchmarks.continual.summary import CellJson, accuracy, final_scores, interval_over_rows, matrix_of
from benchmarks.output import RESULTS, read, templates
from benchmarks.stored_cells import name_of_memory, read_stored_cells
from benchmarks.tables import departures

OPTION_PARTS = (*COMMON, "token_mask")
"""Parts of the method's settings whose settings are options here. token_mask is gone; its cells are kept."""
TRAIN_OPTIONS = ("prompt_loss_weight", "max_steps")
"""Settings of the training that are options here. prompt_loss_weight is gone; its cells are kept. max_steps holds all
rows to the steps of the chosen ones."""
ALL, RANDOM, KEEP = "all rows", "selection.score: random", "selection.keep"
"""Two options that others are compared with, and the setting that says how many rows are kept."""
TRIED_WITH = name_of_memory("none")
"""What `departures` says of the memory that options were tried with."""


@dataclass(frozen=True)
class Trial:
    """One cell, the group whose cells differ in the option alone, and the option."""

    cell: CellJson
    group: str
    option: str


def trial_of(cell: CellJson) -> Trial | None:
    """The trial of a cell; None if the cell departs from the defaults in more than options."""
    settings = json.loads(json.dumps(cell["settings"]))
    method = {
        name: settings["method"].pop(name)
        for name in list(settings["method"])
        if name.partition(".")[0] in OPTION_PARTS
    }
    if departures({**cell, "settings": settings}) not in ("", TRIED_WITH):
        return None
    changes = [
        change.replace(" ", ": ", 1)
        for change in departures(cell).split(", ")
        if change and change != TRIED_WITH and not change.startswith(KEEP)
    ]
    options = {name: settings["train"].pop(name, None) for name in TRAIN_OPTIONS}
    if weight := options["prompt_loss_weight"]:
        changes.append(f"train.prompt_loss_weight: {weight}")
    if method.get(KEEP) and method["selection.score"] == "random":
        changes.append(RANDOM)
    group = json.dumps([settings, cell["perplexity"]["base"]], sort_keys=True)
    return Trial(cell, group, ", ".join(changes) or ALL)


def seconds_of(option: str, cell: CellJson, measured: Mapping[str, Any]) -> float | None:
    """Seconds of an arrival with an option, from the seconds before the training and of a step; None: not measured.

    All scores that read the model read it once, in the same way. What chooses rows or tokens changes no step.
    """
    name = {ALL: "no option"}.get(option, option.partition(",")[0])
    if name not in measured["options"] and name.startswith("selection.score"):
        name = "selection.score: loss"
    settings, seconds = cell["settings"], measured["options"].get(name)
    if seconds is None or settings["train"]["max_prompt_tokens"] != measured["max_prompt_tokens"]:
        return None
    num_steps = sum(version["num_steps"] for version in cell["versions"]) / len(cell["versions"])
    step = (seconds if name.startswith("train.") else measured["options"]["no option"])["step"]
    return float(seconds["before"] * settings["rows"] / measured["rows"] + step * num_steps)


def line_of(trial: Trial, group: Mapping[str, Trial], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one option, accuracies in points, against random rows and all rows of its group."""
    cell, versions = trial.cell, trial.cell["versions"]
    settings, matrix = cell["settings"], matrix_of(cell)
    kept = settings["method"].get(KEEP)
    scores = final_scores(cell).values()
    return {
        "option": trial.option,
        "rows": kept or settings["rows"],
        "seconds": seconds_of(trial.option, cell, measured) if settings["strategy"] == "deal" else None,
        "steps": sum(version["num_steps"] for version in versions),
        "accuracy": 100 * sum(map(accuracy, scores)) / len(scores),
        "perplexity": cell["perplexity"]["adapted"] / cell["perplexity"]["base"],
        "forgetting": None if matrix is None or matrix.forgetting is None else 100 * matrix.forgetting,
        "against": {
            name: [*interval_over_rows([cell], [group[name].cell]).in_points().values()]
            for name in (RANDOM, ALL)
            if name in group and name != trial.option
        },
    }


def tables(cells: Sequence[CellJson], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per group of cells with an option: its settings and its lines, best first."""
    groups: dict[str, dict[str, Trial]] = defaultdict(dict)
    for trial in filter(None, map(trial_of, cells)):
        if trial.option in groups[trial.group]:
            raise ValueError(f"Two cells with {trial.option!r} differ in {TRAIN_OPTIONS}; give them different names.")
        groups[trial.group][trial.option] = trial
    shown = []
    for group in groups.values():
        if len(group) > 1:
            cell = next(iter(group.values())).cell
            settings, machine = cell["settings"], cell["versions"][-1].get("machine", {})
            suite, order = name_of(tuple(settings["tasks"]))
            lines = [line_of(trial, group, measured) for trial in group.values()]
            shown.append(
                {
                    "suite": suite,
                    "order": order,
                    "seed": settings["seed"],
                    "strategy": settings["strategy"],
                    "rows": settings["rows"],
                    "tasks": settings["tasks"],
                    "processor": "AMX" if "amx_bf16" in machine.get("bf16_instructions", []) else "AVX-512",
                    "lines": sorted(lines, key=lambda line: -line["accuracy"]),
                }
            )
    return sorted(shown, key=lambda table: (-table["rows"], table["strategy"], table["order"], table["seed"]))


def arms(path: Path, first_row: int = 0) -> dict[str, dict[str, Any]]:
    """Of the arms of `benchmarks.method.arms` with the first seed: the mean accuracy, and the difference from `plain`.

    Rows of a task before `first_row` do not count. All tasks have as many rows.
    """
    trials = {trial["arm"]: trial for trial in reversed(read(path)["trials"])}
    rows = {
        arm: [float(bit) for _, bits in sorted(trial["outcomes"].items()) for bit in bits[first_row:]]
        for arm, trial in trials.items()
    }
    strata = [len(bits[first_row:]) for _, bits in sorted(trials["plain"]["outcomes"].items())]
    intervals = {arm: paired_interval(scores, rows["plain"], strata=strata).in_points() for arm, scores in rows.items()}
    return {arm: {"mean": 100 * fmean(rows[arm]), "difference": [*each.values()]} for arm, each in intervals.items()}


def merging(path: Path) -> dict[str, float]:
    """Of the first seed of `benchmarks.method.merging`: by version, the mean accuracy over the three tasks."""
    return {name: fmean(scores) for name, scores in read(path)["trials"][0]["scores"].items()}


def masked(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Option → its line, of the table that has the token mask."""
    lines = next(table["lines"] for table in tables if any("token_mask" in line["option"] for line in table["lines"]))
    return {line["option"]: line for line in lines}


def main(
    cells: Annotated[Path, typer.Option(help="Folder of development cells.")] = RESULTS / "development",
    noisy: Annotated[Path, typer.Option(help="Folder of cells whose training rows have wrong labels.")] = RESULTS
    / "noisy",
    trials: Annotated[Path, typer.Option(help="Result of benchmarks.method.arms.")] = RESULTS / "arms.json",
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("benchmarks/data_efficiency.md"),
) -> None:
    """Fill the page."""
    measured = read(RESULTS / "option_seconds.json")
    clean = tables(read_stored_cells(cells), measured)
    values = {
        "clean": clean,
        "masked": masked(clean),
        "noisy": tables(read_stored_cells(noisy), measured),
        "seconds": measured,
        "arms": arms(trials),
        "merging": merging(RESULTS / "merging.json"),
        "unlabelled": arms(RESULTS / "arms_unlabelled.json"),
        "preferences": read(RESULTS / "preferences.json"),
    }
    page.write_text(templates().get_template("data_efficiency.md.j2").render(values))
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
