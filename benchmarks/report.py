"""Write the pages of the cells of the earlier rehearsal from stored results: `python -m benchmarks.report`.

They are benchmarks/earlier.md and benchmarks/cells.md. `benchmarks.headline` writes the page of today's method.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, get_args

import typer

from benchmarks.continual.paired import paired_interval
from benchmarks.continual.suites import name_of as suite_of
from benchmarks.continual.summary import OURS, CellJson, accuracy, final_scores, method_name
from benchmarks.data_efficiency import arms
from benchmarks.method.leads import by_kind, lead, points_of
from benchmarks.method.protocol import GONE, named_changes, todays_training, training_of
from benchmarks.method.protocol import describe as describe_training
from benchmarks.method.protocol import lines as protocol_lines
from benchmarks.output import RESULTS, read, templates
from benchmarks.stored_cells import NUM_TEXTS, Memory, name_of_memory, read_stored_cells
from benchmarks.tables import (
    ALL_BOUNDS,
    Protocol,
    compared_with,
    departures,
    judged_tasks,
    method_of,
    protocols,
    summarise,
)
from deal_core.config import TrainConfig
from deal_core.judging_config import GateConfig

OURS_WITHOUT, OURS_WITH_TESTS, OURS_WITH_ROWS = (method_name(OURS, name_of_memory(each)) for each in get_args(Memory))
CHOSEN_BY = ("joint", "seq_lora", OURS_WITH_ROWS)
"""The methods whose mean chose the training settings."""
CHOICE_SUITE, CHOICE_SEED = "4", 100
"""Suite and seed of the cells that chose the training settings."""
CHOOSING_ROWS = 100
"""The first development rows of a task, on which the number of steps that re-centre was chosen."""
SHOWN_AS = {
    "rehearsal.stored_share 0.1, rehearsal.rows_per_step 1": "a tenth of the rows",
    "rehearsal.stored_share 0.3333": "50 rows, four a step",
}
"""Settings of a method → what the page calls them."""
LEADS = ((OURS_WITH_ROWS, OURS_WITHOUT), (OURS_WITH_TESTS, OURS_WITH_ROWS))
"""Pairs of methods whose difference cells.md shows; that to the default stands in the tables."""


def points(value: float | None) -> str:
    """Percentage points; a dash if undefined."""
    return "–" if value is None else f"{value:.1f}"


def interval(values: Sequence[float] | None) -> str:
    """A difference with its interval; empty if it was not computed."""
    return "" if values is None else f"{values[0]:+.1f} ({values[1]:+.1f} to {values[2]:+.1f})"


def spread_of_seeds(cells: Sequence[CellJson]) -> dict[str, float]:
    """By method, the largest difference of AA between two cells that differ only in the seed and round alike."""
    groups: dict[tuple[str, str], list[CellJson]] = defaultdict(list)
    for cell in cells:
        settings = {name: value for name, value in cell["settings"].items() if name not in ("seed", "scored")}
        settings["train"] = {name: value for name, value in settings["train"].items() if name != "seed"}
        if settings["strategy"] not in ALL_BOUNDS:
            same = json.dumps([settings, cell["perplexity"].get("base")], sort_keys=True)
            groups[method_of(cell), same].append(cell)
    spreads: dict[str, float] = defaultdict(float)
    for (method, _), group in groups.items():
        if len(group) > 1:
            scores = [100 * fmean(map(accuracy, final_scores(cell).values())) for cell in group]
            spreads[method] = max(spreads[method], max(scores) - min(scores))
    return dict(spreads)


def recentred(path: Path, *others: Path) -> dict[str, Any]:
    """What steps that re-centre, and texts of the old tasks' own, give by `benchmarks.method.arms`, in points.

    The trials of `path` have one seed, and those of each of the others have another.
    """
    trials, by_seed = read(path), [arms(of_seed) for of_seed in (path, *others)]
    plain = [arms_of_seed["plain"]["mean"] for arms_of_seed in by_seed]
    return {
        "arms": arms(path, CHOOSING_ROWS),
        "own": [arms_of_seed["own"] for arms_of_seed in by_seed],
        "first": first_answers((path, *others), path.with_name("arms_saved.json")),
        "plain_spread": max(plain) - min(plain),
        "steps": trials["recentre_steps"],
        "arrival_steps": TrainConfig().num_steps(trials["rows"]),
    }


def first_answers(asked_again: Sequence[Path], asked_once: Path) -> list[float]:
    """The arm saved of `benchmarks.method.arms` minus own, over all seeds of both: points, and their interval."""
    own = {trial["seed"]: trial for path in asked_again for trial in read(path)["trials"] if trial["arm"] == "own"}
    pairs = [(trial, own[trial["seed"]]) for trial in read(asked_once)["trials"]]
    tasks = sorted(pairs[0][0]["outcomes"])

    def mean_rows(trials: Sequence[Mapping[str, Any]]) -> list[float]:
        return [
            fmean(map(float, bits))
            for task in tasks
            for bits in zip(*(trial["outcomes"][task] for trial in trials), strict=True)
        ]

    saved, before = (mean_rows(trials) for trials in zip(*pairs, strict=True))
    strata = [len(pairs[0][0]["outcomes"][task]) for task in tasks]
    return [*paired_interval(saved, before, strata=strata).in_points().values()]


def num_not_learned(protocol: Protocol) -> int:
    """Tasks that the cells of the default memory learn less well than the gate's default `min_gain_points` asks for.

    The gate compares with the commonest answer, and with the base model, whose answers the cells do not keep.
    """
    name, counts, wanted = name_of_memory("tests"), [0], GateConfig().min_gain_points
    for cell in (cell for cell in protocol.cells if departures(cell) == name):
        learned = [version["scores"][version["task"]] for version in cell["versions"]]
        counts.append(sum(100 * (accuracy(score) - score["majority_rate"]) < wanted for score in learned))
    return max(counts)


def describe(protocol: Protocol) -> dict[str, Any]:
    """What the page shows of one table: its protocol, its lines and its tasks."""
    rows = summarise(protocol, judged_tasks(protocol))
    settings = some_cell(protocol)["settings"]
    whole = [row for row in rows if row["orders"] == widest(rows, row)]
    trained = [row for row in whole if row["minutes"] is not None]
    return {
        "suite": protocol.suite,
        "settings": settings,
        "train": training_of(settings),
        "rows": rows,
        "tasks": task_lines(protocol, rows),
        "num_not_learned": num_not_learned(protocol),
        "num_counted": len(judged_tasks(protocol)),
        "counted": ", ".join(judged_tasks(protocol)),
        "compared": compared_with({row["changes"] for row in rows if row["strategy"] == OURS}),
        "widest": whole,
        "is_judged": bool(protocol.lifted()),
        "num_alone": len(protocol.per_task),
        "differences": [row for row in whole if "heaviest_task" in row],
        "num_trained": sum(row["num_cells"] for row in trained),
        "core_hours": sum(row["minutes"] * row["num_cells"] for row in trained) / 60,
        "by_method": by_method(protocol),
    }


def by_method(protocol: Protocol) -> dict[str, dict[str, Any]]:
    """By method, over its cells: what it kept of each task, how long a later arrival is trained, and other English.

    The last is the perplexity of other English texts in the end, times the base model's.
    """
    groups: dict[str, list[CellJson]] = defaultdict(list)
    for cell in protocol.cells:
        groups[method_of(cell)].append(cell)
    figures = {}
    for name, cells in groups.items():
        later = [version for cell in cells for version in cell["versions"][1:] if "seconds" in version]
        is_one_order = len({tuple(cell["settings"]["tasks"]) for cell in cells}) == 1
        measured = [cell["perplexity"] for cell in cells if cell.get("perplexity")]
        ratios = [perplexity["adapted"] / perplexity["base"] for perplexity in measured]
        figures[name] = {
            "kept": points_of(cells) if is_one_order else {},
            "seconds": median(version["seconds"]["train"] for version in later) if later else None,
            "perplexity_ratio": fmean(ratios) if ratios else None,
        }
    return figures


def some_cell(protocol: Protocol) -> CellJson:
    """A cell of the table: what all of them share is read from it."""
    trained = (*protocol.cells, *protocol.per_task, *protocol.joint, *protocol.others)
    return (*trained, *([protocol.base] if protocol.base else []))[0]


def task_lines(protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy of every task in the end: by column of the table, one dict per task."""
    columns = {name_of(row): row for row in rows if row["orders"] == widest(rows, row)}
    some = final_scores(some_cell(protocol))
    lifted = protocol.lifted()
    lines = [
        {
            "task": name,
            "num_rows": len(score["correct"]),
            "majority": 100 * score["majority_rate"],
            "lifted": lifted.get(name),
            "values": [row["accuracy_by_task"].get(name) for row in columns.values()],
        }
        for name, score in sorted(some.items())
    ]
    return {"columns": list(columns), "num_cells": [row["num_cells"] for row in columns.values()], "lines": lines}


def lift_lines(cells: Sequence[CellJson]) -> list[dict[str, Any]]:
    """What an adapter of its own brings each task, in points; best first."""
    lines = [
        {"task": name, "lift": lift, "points": {name: 100 * value for name, value in vars(lift).items()}}
        for protocol in protocols(cells)
        for name, lift in protocol.lifts().items()
    ]
    return sorted(lines, key=lambda line: line["lift"].base - line["lift"].alone)


def widest(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Any:
    """The orders of the line that covers most of a strategy's cells."""
    return max((other["orders"] for other in rows if name_of(other) == name_of(row)), key=len)


def keeps(row: Mapping[str, Any]) -> str:
    """What a line's method keeps of the old tasks' data."""
    asks_texts = "recentre_steps" in row["changes"] or name_of_memory("tests") in row["changes"]
    if "rehearsal.answers first" in row["changes"]:
        return f"{NUM_TEXTS} texts a task, answers"
    return f"{NUM_TEXTS} texts a task" if asks_texts and row["stores"] == "nothing" else row["stores"] or "–"


def name_of(row: Mapping[str, Any]) -> str:
    """A strategy, and in what it departs from the defaults."""
    return method_name(row["strategy"], row["changes"])


def tried_lines(cells: Sequence[CellJson]) -> list[dict[str, Any]]:
    """The lines of all tables of development cells: by suite, order and number of rows, best first."""
    lines = []
    for protocol in protocols(cells):
        cell = some_cell(protocol)
        settings = cell["settings"]
        shared = {
            "suite": protocol.suite,
            "rows": settings["rows"],
            "num_test": sum(len(score["correct"]) for score in final_scores(cell).values()),
            "train": training_of(settings),
        }
        lines += [{**shared, **row, "changes": named_changes(row["changes"], settings)} for row in summarise(protocol)]
    return sorted(
        lines,
        key=lambda line: (
            line["suite"].zfill(3),
            line["orders"],
            -line["rows"],
            line["num_test"],
            -line["average_accuracy"],
        ),
    )


def shown(name: str) -> str:
    """A method's name as the page shows it."""
    for settings, words in SHOWN_AS.items():
        name = name.replace(settings, words)
    return name


def roundings(cells: Sequence[CellJson]) -> dict[str, list[str]]:
    """Names of the cells by the base model's perplexity, which differs where sums of bf16 products round otherwise."""
    seeds: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for cell in cells:
        settings, before = cell["settings"], cell.get("perplexity", {}).get("base")
        name = f"suite {suite_of(tuple(settings['tasks']))[0]}, {method_of(cell)}"
        seeds[f"{before:.3f}" if before else "not recorded"][name].add(settings["seed"])
    return {
        figure: [f"{name}, seed {' and '.join(map(str, sorted(of_name)))}" for name, of_name in sorted(names.items())]
        for figure, names in sorted(seeds.items())
    }


def seconds_beside_steps(cells: Sequence[CellJson]) -> dict[str, tuple[float, float]]:
    """What the second and the last arrival take beside their optimiser steps, medians by strategy at its defaults.

    `rows_per_second` counts a row once for every pass over it.
    """
    beside: dict[str, list[list[float]]] = defaultdict(list)
    for cell in cells:
        settings = cell["settings"]
        is_default = departures(cell) in ("", *map(name_of_memory, get_args(Memory)))
        if is_default and settings["strategy"] not in ALL_BOUNDS and len(cell["versions"]) > 1:
            rows = settings["train"]["num_epochs"] * settings["rows"]
            ends = (cell["versions"][1], cell["versions"][-1])
            beside[method_of(cell)].append([end["seconds"]["train"] - rows / end["rows_per_second"] for end in ends])
    return {
        name: (median(second for second, _ in pairs), median(last for _, last in pairs))
        for name, pairs in sorted(beside.items())
    }


def _has_chosen(line: Mapping[str, Any]) -> bool:
    """Whether the line's cell was among those that chose the training settings. Later cells tried other settings."""
    is_theirs = (line["order"], line["seed"]) in (("1", CHOICE_SEED), ("any", CHOICE_SEED))
    method = line["method"].removesuffix(" (chat prompts)")
    return is_theirs and GONE not in line["train"] and method in CHOSEN_BY


def choice_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of greedy and re-centred accuracy: by training settings that all three methods were run with."""
    of_suite = [line for line in lines if line["suite"] == CHOICE_SUITE]
    by: dict[str, dict[str, float]] = defaultdict(dict)
    trains = {describe_training(line["train"]): line["train"] for line in of_suite}
    for line in of_suite:
        by[describe_training(line["train"])][line["method"]] = fmean([line["greedy"], line["re-centred"]])
    complete = {name: [of[method] for method in CHOSEN_BY] for name, of in by.items() if {*CHOSEN_BY} <= {*of}}
    return {
        "methods": CHOSEN_BY,
        "lines": [
            {"train": trains[name], "values": values, "mean": fmean(values)} for name, values in complete.items()
        ],
    }


def main(
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("benchmarks/earlier.md"),
    cells_page: Annotated[Path, typer.Option(help="Page of the development cells to write.")] = Path(
        "benchmarks/cells.md"
    ),
) -> None:
    """Fill the page with the stored figures."""
    pages = templates()
    pages.filters |= {"points": points, "interval": interval, "name": name_of, "keeps": keeps, "shown": shown}
    pages.filters["training"] = describe_training
    recentring = read(
        results / "recentring.json"
    )  # read first: if it is missing, the message comes before the long work
    cells, development = (read_stored_cells(results / folder) for folder in ("continual", "development"))
    all_protocols = protocols(cells)
    tables = sorted(
        map(describe, all_protocols),
        key=lambda table: table["suite"].zfill(3),
    )
    tried = tried_lines(development)
    protocol = sorted(
        filter(_has_chosen, protocol_lines(development)), key=lambda line: (line["suite"], line["method"])
    )
    today, steps = todays_training(), recentred(results / "arms_recentred.json", results / "arms_own.json")
    todays_cells = [cell for cell in cells if training_of(cell["settings"]) == today]
    current = [each for each in all_protocols if training_of(some_cell(each)["settings"]) == today]
    current.sort(key=lambda each: each.suite.zfill(3))
    (long,) = (each for each in current if each.suite == "15")
    at = f"train.recentre_steps {steps['steps']}"
    leads = [lead(each, first, second) for each in current for first, second in LEADS]
    reported = protocol_lines(todays_cells)
    page_values = {
        "current": [table for table in tables if table["train"] == today],
        "low": [table for table in tables if table["train"] != today],
        "reported": sorted(reported, key=lambda line: (line["suite"], line["order"], line["seed"], line["method"])),
        "tables": tables,
        "tried": tried,
        "num_tried": len(tried),
        "protocol": protocol,
        "chosen": choice_of(protocol),
        "lifts": lift_lines(read_stored_cells(results / "superni")),
        "roundings": roundings(cells),
        "arms": read(results / "pairs.json")["arms"],
        "kept_labels": read(results / "kept_labels.json")["cells"],
        "recentring": recentring,
        "ours_without": OURS_WITHOUT,
        "ours_with_tests": OURS_WITH_TESTS,
        "ours_with_rows": OURS_WITH_ROWS,
        "recentred": steps,
        "lead": lead(long, method_name(OURS, f"{name_of_memory('none')}, {at}"), method_name("seq_lora", at)),
        "leads": [each for each in leads if each],
        "kinds": by_kind(long),
        "spread": spread_of_seeds(cells),
        "coverage": read(results / "paired_coverage.json"),
        "few_tests": read(results / "test_rows.json"),
        "beside": seconds_beside_steps([cell for cell in todays_cells if len(cell["settings"]["tasks"]) == 15]),
    }
    page.write_text(pages.get_template("earlier.md.j2").render(page_values))
    cells_page.write_text(pages.get_template("cells.md.j2").render(page_values))
    typer.echo(f"{page} and {cells_page} written")


if __name__ == "__main__":
    typer.run(main)
