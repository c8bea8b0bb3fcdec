"""One setting, judged by the cells that differ in nothing else.

    python -m benchmarks.method.pairs --setting method.rehearsal.balance_stored --setting train.prompt_loss_weight

A pair is a cell with the setting and one without it, on the same order, seed, rows and processor. The difference is
that of the mean accuracy in the end, in points. Its intervals are over test rows (95 %, bootstrap) and over cells
(80 %, Student's t). A setting gains something if the mean is at least 1 and the lower end over four or more cells is
above 0. The rule was written before the first cell was run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from scipy.stats import t

from benchmarks.continual.paired import PairedInterval, paired_interval
from benchmarks.continual.suites import name_of
from benchmarks.continual.summary import CellJson, accuracy, final_scores, interval_over_rows
from benchmarks.method.protocol import todays_training, training_of
from benchmarks.output import RESULTS, Out, write_result
from benchmarks.stored_cells import LEFT_OUT_OF_REHEARSAL, LEFT_OUT_OF_TRAINING, read_stored_cells, unpack_answers
from benchmarks.tables import method_of
from deal_core.evaluation.label_scores import recentred_hits
from deal_core.method_config import DealConfig

OUT, CELLS = RESULTS / "pairs.json", RESULTS / "development"
SETTINGS = (
    "method.rehearsal.balance_stored",
    "method.rehearsal.parent_share",
    "train.prompt_loss_weight",
    "train.recentre_steps",
    "method.deal.core",
)
DEFAULTS = {
    "method.deal.core": DealConfig().core,
    **{f"method.{name}": value for name, value in LEFT_OUT_OF_REHEARSAL.items()},
    **{f"train.{name}": value for name, value in LEFT_OUT_OF_TRAINING.items()},
}
"""Setting → the value that a pair is compared with."""
LEAST_GAIN, FEWEST_CELLS, SHARE = 1.0, 4, 0.8


def split(cell: CellJson, setting: str) -> tuple[str, Any]:
    """All of a cell's settings but one, as JSON, and the value of that one; None if it is the default or missing."""
    part, _, name = setting.partition(".")
    settings = json.loads(json.dumps(cell["settings"]))
    value = settings[part].pop(name, None)
    settings["base_perplexity"] = cell["perplexity"]["base"]
    return json.dumps(settings, sort_keys=True), None if value == DEFAULTS.get(setting) else value


def pairs_of(cells: Sequence[CellJson], setting: str) -> Iterator[tuple[Any, CellJson, CellJson]]:
    """The setting's value, the cell with it and the cell without it."""
    groups: dict[str, dict[Any, CellJson]] = defaultdict(dict)
    for cell in cells:
        rest, value = split(cell, setting)
        groups[rest][value] = cell
    for group in groups.values():
        if None in group:
            yield from ((value, cell, group[None]) for value, cell in group.items() if value is not None)


def recentred_difference(cell: CellJson, other: CellJson) -> PairedInterval | None:
    """As `interval_over_rows`, of re-centred answers; None if a cell keeps no log-probabilities of labels."""
    hits: list[list[float]] = [[], []]
    strata: list[int] = []
    for name in sorted(final_scores(cell)):
        for side, of_cell in zip(hits, (cell, other), strict=True):
            answers = unpack_answers(final_scores(of_cell)[name])
            if answers is None:
                return None
            side += map(float, recentred_hits(answers.log_probs_NL, answers.targets_N))
        strata.append(len(hits[0]) - sum(strata))
    return paired_interval(*hits, strata=strata)


def compare(value: Any, pairs: Sequence[tuple[CellJson, CellJson]]) -> dict[str, Any]:
    """The figures of one value of a setting with one method."""
    lines = []
    for after, before in pairs:
        with_it, without = (fmean(map(accuracy, final_scores(cell).values())) for cell in (after, before))
        over_rows, recentred = interval_over_rows([after], [before]), recentred_difference(after, before)
        settings = after["settings"]
        suite, order = name_of(tuple(settings["tasks"]))
        lines.append(
            {
                "suite": suite,
                "order": order,
                "seed": settings["seed"],
                "with": 100 * with_it,
                "without": 100 * without,
                "difference_over_rows": over_rows.in_points(),
                "recentred": recentred and recentred.in_points(),
                "perplexity": [cell["perplexity"]["adapted"] for cell in (after, before)],
            }
        )
    differences = [line["with"] - line["without"] for line in lines]
    return {
        "value": value,
        "num_cells": len(lines),
        "mean": fmean(differences),
        **over_cells(differences),
        "pairs": lines,
    }


def over_cells(differences: Sequence[float]) -> Mapping[str, Any]:
    """The t-interval of SHARE over differences of pairs of cells, and whether it is a gain by this module's rule."""
    count = len(differences)
    if count < 2:
        return {"low": None, "high": None, "gains": False}
    half = float(t.ppf((1 + SHARE) / 2, count - 1)) * stdev(differences) / count**0.5
    mean = fmean(differences)
    gains = mean >= LEAST_GAIN and mean - half > 0 and count >= FEWEST_CELLS
    return {"low": mean - half, "high": mean + half, "gains": gains}


def main(
    setting: Annotated[
        list[str] | None,
        typer.Option(help="A setting: method.PART.NAME or train.NAME.", show_default=", ".join(SETTINGS)),
    ] = None,
    cells: Annotated[Path, typer.Option(help="Folder of cells.")] = CELLS,
    out: Out = OUT,
) -> None:
    """Write the figures of every value of these settings, method by method."""
    todays = todays_training()
    comparable = [cell for cell in read_stored_cells(cells) if training_of(cell["settings"]).items() >= todays.items()]
    arms: list[dict[str, Any]] = []
    for name in setting or SETTINGS:
        groups: dict[tuple[str, Any], list[tuple[CellJson, CellJson]]] = defaultdict(list)
        for value, after, before in pairs_of(comparable, name):
            groups[method_of(before), value].append((after, before))
        arms += [
            {"setting": name, "method": method, **compare(value, pairs)} for (method, value), pairs in groups.items()
        ]
    write_result(out, {"arms": arms})


if __name__ == "__main__":
    typer.run(main)
