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
from typing import Annotated, Any

import typer

from benchmarks.continual.suites import name_of
from benchmarks.continual.summary import CellJson, accuracy, final_scores, interval_over_rows, matrix_of, read_cells
from benchmarks.output import RESULTS, read, templates

ALL, RANDOM, KEEP = "all rows", "selection.score: random", "selection.keep"
"""Two options that others are compared with, and the setting that says how many rows are kept."""


@dataclass(frozen=True)
class Trial:
    """One cell, the group whose cells differ in the option alone, and the option."""

    cell: CellJson
    group: str
    option: str


def trial_of(cell: CellJson) -> Trial:
    """The trial of a cell. `train.max_steps` is no part of the group: it holds all rows to the steps of the chosen."""
    settings = json.loads(json.dumps(cell["settings"]))
    selection = {name: settings["method"].pop(name) for name in [*settings["method"]] if name.startswith("selection.")}
    del settings["train"]["max_steps"]
    options = []
    if selection.get("selection.noise", "none") != "none":
        options.append(f"selection.noise: {selection['selection.noise']}")
    if selection.get(KEEP):
        options.append(f"selection.score: {selection['selection.score']}")
        options += [f"{name}: {value}" for name, value in selection.get("selection.score_options", {}).items()]
    group = json.dumps([settings, cell["perplexity"]["base"]], sort_keys=True)
    return Trial(cell, group, ", ".join(options) or ALL)


def seconds_of(option: str, cell: CellJson, measured: Mapping[str, Any]) -> float | None:
    """Seconds of an arrival with an option, from the seconds before the training and of a step; None: not measured.

    All scores that read the model read it once, in the same way. What chooses rows changes no step.
    """
    name = {ALL: "no option"}.get(option, option.partition(",")[0])
    if name not in measured["options"] and name.startswith("selection.score"):
        name = "selection.score: loss"
    settings, seconds = cell["settings"], measured["options"].get(name)
    if seconds is None or settings["train"]["max_prompt_tokens"] != measured["max_prompt_tokens"]:
        return None
    num_steps = sum(version["num_steps"] for version in cell["versions"]) / len(cell["versions"])
    return float(
        seconds["before"] * settings["rows"] / measured["rows"] + measured["options"]["no option"]["step"] * num_steps
    )


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
    for trial in map(trial_of, cells):
        if trial.option in groups[trial.group]:
            raise ValueError(f"Two cells with {trial.option!r} differ in train.max_steps alone; give one of them.")
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


def main(
    cells: Annotated[Path, typer.Option(help="Folder of development cells.")] = RESULTS / "development",
    noisy: Annotated[Path, typer.Option(help="Folder of cells whose training rows have wrong labels.")] = RESULTS
    / "noisy",
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("benchmarks/data_efficiency.md"),
) -> None:
    """Fill the page."""
    measured = read(RESULTS / "option_seconds.json")
    values = {
        "clean": tables(read_cells(cells, oldest=2), measured),
        "noisy": tables(read_cells(noisy, oldest=2), measured),
        "seconds": measured,
        "preferences": read(RESULTS / "preferences.json"),
    }
    page.write_text(templates().get_template("data_efficiency.md.j2").render(values))
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
