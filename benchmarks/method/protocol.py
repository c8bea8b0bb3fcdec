"""The protocol: how long and at which rate every method trains, compared on development rows.

    python -m benchmarks.method.protocol

It reads the stored development cells that keep answers and log-probabilities of labels, and trains nothing. Every
figure is a mean over JUDGED, the tasks whose own adapter beats the majority class and the base model.

- greedy: accuracy of the answers that were generated;
- labels: accuracy if only labels may be answered;
- re-centred: accuracy if every label is answered as often as it occurs;
- AUC: area under the ROC curve, averaged over pairs of labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.continual.cell import PROTOCOL
from benchmarks.continual.suites import name_of
from benchmarks.continual.summary import CellJson, accuracy, final_scores, method_name
from benchmarks.output import RESULTS
from benchmarks.stored_cells import FIXED, read_stored_cells, unpack_answers
from benchmarks.tables import JUDGED, departures
from deal_core.config import TrainConfig
from deal_core.evaluation.label_scores import Floats, recentred_accuracy

CELLS = RESULTS / "development"
CELL_FOLDERS = (RESULTS / "continual", CELLS)
FIGURES = ("greedy", "labels", "re-centred", "AUC")
SHOWN = ("num_epochs", "min_steps", "learning_rate", "schedule", "balance_labels")
"""Training settings that make a protocol."""
GONE = "prompt_loss_weight"
"""A training setting that exists no more, and makes a protocol of its own."""


def constrained_accuracy(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float:
    """Accuracy if only labels may be answered."""
    return float((log_probs_NL.argmax(1) == targets_N).mean())


def ranking_auc(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float | None:
    """Area under the ROC curve, averaged over pairs of labels (Hand and Till, 2001); None with fewer than two labels.

    For a pair, rows of both labels are ranked by the difference of the two log-probabilities.
    """
    present = np.unique(targets_N)
    areas = []
    for i, first in enumerate(present):
        for second in present[i + 1 :]:
            of_pair = (targets_N == first) | (targets_N == second)
            scores = log_probs_NL[of_pair, second] - log_probs_NL[of_pair, first]
            is_second = targets_N[of_pair] == second
            areas.append(_area(np.sort(scores[~is_second]), scores[is_second]))
    return float(np.mean(areas)) if areas else None


def _area(lower_N: Floats, upper_M: Floats) -> float:
    """Share of pairs in which the upper score is larger, ties as half; the lower scores are sorted."""
    num_below = np.searchsorted(lower_N, upper_M, "left") + np.searchsorted(lower_N, upper_M, "right")
    return float(num_below.mean() / (2 * len(lower_N)))


def figures_of(cell: CellJson) -> dict[str, Any] | None:
    """The figures of a cell at its end, in percent; None if it keeps no log-probabilities of labels."""
    scores = {name: score for name, score in final_scores(cell).items() if name in JUDGED}
    kept = {name: unpack_answers(score) for name, score in scores.items()}
    if not scores or None in kept.values():
        return None
    answers = {name: each for name, each in kept.items() if each is not None}
    by_task = {name: 100 * accuracy(score) for name, score in scores.items()}
    targets = [(each.log_probs_NL, each.targets_N) for each in answers.values()]
    return {
        "greedy": fmean(by_task.values()),
        "labels": 100 * fmean(constrained_accuracy(*pair) for pair in targets),
        "re-centred": 100 * fmean(recentred_accuracy(*pair) for pair in targets),
        "AUC": 100 * fmean(ranking_auc(*pair) or 0.0 for pair in targets),
        "by_task": by_task,
    }


def training_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The training settings that make the protocol of a cell."""
    return {name: settings["train"][name] for name in (*SHOWN, GONE) if name in settings["train"]}


def todays_training() -> dict[str, Any]:
    """The training settings that make today's protocol."""
    return training_of({"train": asdict(TrainConfig(**PROTOCOL)) | FIXED})


def todays_cells(folders: Iterable[Path] | None = None) -> Iterator[tuple[CellJson, dict[str, Any]]]:
    """Cells under today's training, and what names each: suite, order, seed, part of the rows, method."""
    for cell in (cell for folder in folders or CELL_FOLDERS for cell in read_stored_cells(folder)):
        settings = cell["settings"]
        if training_of(settings) == todays_training():
            suite, order = name_of(tuple(settings["tasks"]))
            method = method_name(settings["strategy"], departures(cell))
            yield (
                cell,
                {"suite": suite, "order": order, "seed": settings["seed"], "part": settings["part"], "method": method},
            )


def named_changes(changes: str, settings: Mapping[str, Any]) -> str:
    """A cell's departures from the defaults, and its prompts if they are chats: these make a table of their own."""
    return ", ".join(filter(None, [changes, "chat prompts" if settings.get("prompt") == "chat" else ""]))


def lines(cells: Sequence[CellJson]) -> Iterator[dict[str, Any]]:
    """One line per cell: suite, order, protocol, method and figures."""
    for cell in cells:
        settings, found = cell["settings"], figures_of(cell)
        if found is None:
            continue
        suite, order = name_of(tuple(settings["tasks"]))
        changes = named_changes(departures(cell), settings)
        yield {
            "suite": suite,
            "order": "any" if settings["strategy"] == "joint" else order,
            "seed": settings["seed"],
            "train": training_of(settings),
            "method": method_name(settings["strategy"], changes),
            "seconds": sum(version.get("seconds", {}).get("train", 0.0) for version in cell["versions"]),
            "bf16": cell["versions"][-1].get("machine", {}).get("bf16_instructions", []),
            **found,
        }


def describe(train: Mapping[str, Any]) -> str:
    """A protocol in a few words."""
    epochs = train["num_epochs"]
    parts = [f"{epochs} epoch{'s' if epochs > 1 else ''}", f"rate {train['learning_rate']:g} {train['schedule']}"]
    parts += [f"at least {train['min_steps']} steps"] if train["min_steps"] else []
    parts += ["labels balanced"] if train["balance_labels"] else []
    parts += [f"texts weigh {train[GONE]:g}"] if GONE in train else []
    return ", ".join(parts)


def table_of(found: Sequence[Mapping[str, Any]]) -> Table:
    """The lines for people, ordered by suite, method and protocol."""
    table = Table(box=None)
    for column in ("suite", "order", "seed", "method", "protocol", *FIGURES, "minutes", "every task"):
        table.add_column(column, justify="right" if column in FIGURES else "left", overflow="fold")
    for line in sorted(found, key=lambda each: (each["suite"], each["method"], describe(each["train"]))):
        table.add_row(
            line["suite"],
            line["order"],
            str(line["seed"]),
            line["method"],
            describe(line["train"]),
            *(f"{line[name]:.1f}" for name in FIGURES),
            f"{line['seconds'] / 60:.0f}",
            ", ".join(f"{name} {value:.0f}" for name, value in line["by_task"].items()),
        )
    return table


def main(
    cells: Annotated[Path, typer.Option(help="Folder of the development cells.")] = CELLS,
) -> None:
    """Print the figures as JSON, and as a table for people to standard error."""
    found = list(lines(read_stored_cells(cells)))
    typer.echo(json.dumps(found, indent=1))
    Console(stderr=True, width=180).print(table_of(found))


if __name__ == "__main__":
    typer.run(main)
