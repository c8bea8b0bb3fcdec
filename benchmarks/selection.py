"""What rows and tokens are trained on: what it costs to choose them, and how many wrong labels are found.

    OMP_NUM_THREADS=1 python -m benchmarks.selection cost
    python -m benchmarks.selection options --data FOLDER
    OMP_NUM_THREADS=1 python -m benchmarks.selection label-noise --data FOLDER

cost: a lineage has learned a first task, and an arrival of that many generated rows is its second. A share of it is
chosen by a score and learned. Each number of rows has a process of its own. The tiny base model shows what rows cost
besides the model; a real base adds its weights and its activations, which do not depend on the number of rows.

options: the seconds of every option before the training and in a step, with a real base. The rows are the second
arrival of a lineage. The options take turns in random order.

label-noise: precision and recall of `selection.noise`. A share of a task's labels is replaced by another label of the
task. The base model reads the rows once, since their texts stay the same.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.continual.suites import load_suite
from benchmarks.method.versions import train_into
from benchmarks.noisy_pool import corrupted
from benchmarks.output import RESULTS, Base, Out, alone, peak_bytes, write_result
from benchmarks.speed.ingest import CHUNK_ROWS, TASK, text_of
from benchmarks.tiny_base import build_tiny_base
from deal_core.base_model.load import BaseModel, load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig, SelectionConfig
from deal_core.selection.choose import choose_rows
from deal_core.selection.label_noise import features, suspected_labels
from deal_core.training.train import TrainingSetup
from infra.settings import HomeSettings

TRAIN = TrainConfig(num_epochs=1, max_prompt_tokens=96, checkpoint_steps=0)
FIRST_ROWS = 200
NUMBERS_OF_ROWS = (10_000, 100_000)
NOISY_TASKS = ("agnews", "dbpedia", "amazon")
WRONG_SHARES = (0.0, 0.1, 0.3)
KEPT, STEPS = 75, 8
"""Rows that are chosen, and steps of a trial of `options`."""
PLAIN = "no option"
OPTIONS: dict[str, MethodConfig] = {
    PLAIN: MethodConfig(),
    "selection.score: random": MethodConfig(selection=SelectionConfig(keep=KEPT, score="random")),
    "selection.score: length": MethodConfig(selection=SelectionConfig(keep=KEPT, score="length")),
    "selection.score: loss": MethodConfig(selection=SelectionConfig(keep=KEPT, score="loss")),
    "selection.score: gradient": MethodConfig(selection=SelectionConfig(keep=KEPT, score="gradient")),
    "selection.noise: leave_out": MethodConfig(selection=SelectionConfig(noise="leave_out")),
}
"""Option → the method's settings."""

app = typer.Typer(help=__doc__, rich_markup_mode=None)


def write_rows(path: Path, num_rows: int) -> None:
    """Write generated rows as ingest stores them, a chunk at a time."""
    schema = pa.schema([("input", pa.string()), ("output", pa.string()), ("sha256", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, CHUNK_ROWS):
            chunk = [
                {"input": text_of(number), "output": TASK.labels[number % len(TASK.labels)], "sha256": f"{number:064x}"}
                for number in range(first, min(first + CHUNK_ROWS, num_rows))
            ]
            writer.write_table(pa.Table.from_pylist(chunk, schema))


def choose_and_train(num_rows: int, score: str, keep: float, max_scored: int) -> dict[str, Any]:
    """Let a lineage of one task learn the chosen rows of a second arrival; return what it took."""
    disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_tiny_base(folder / "base")
        base = load_base(str(folder / "base"), folder / "cache", precision="fp32")
        method = MethodConfig(selection=SelectionConfig(keep=keep, score=score))
        setup = TrainingSetup(task=TASK, strategy="deal", adapter=AdapterConfig(), method=method, train=TRAIN)
        write_rows(folder / "first.parquet", FIRST_ROWS)
        write_rows(folder / "rows.parquet", num_rows)
        first = Dataset.from_parquet(str(folder / "first.parquet"), cache_dir=str(folder / "first-rows"))
        train_into(folder / "first", base, first, setup)
        before, started = peak_bytes(), time.perf_counter()
        rows = Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "rows"))
        with patch.object(SelectionConfig, "max_scored", max_scored):
            chosen = choose_rows(
                rows, setup, lambda: base, parent_folder=folder / "first", journal=folder / "selection.json"
            )
        selected = time.perf_counter()
        result = train_into(folder / "second", base, rows.select(chosen.rows), setup, folder / "first")
        return {
            "rows": num_rows,
            "chosen": len(chosen.rows),
            "steps": result.num_steps,
            "notes": list(chosen.notes),
            "seconds": {"choose": selected - started, "train": time.perf_counter() - selected},
            "peak_bytes": {"before": before, "after": peak_bytes()},
        }


@app.command()
def cost(
    rows: Annotated[
        list[int] | None, typer.Option(help="Rows of the arrival.", show_default=str(NUMBERS_OF_ROWS))
    ] = None,
    score: Annotated[str, typer.Option(help="Score to choose by.")] = "loss",
    keep: Annotated[float, typer.Option(help="Share of the rows that is trained on.")] = 0.01,
    max_scored: Annotated[int, typer.Option(help="Most rows that the model reads.")] = 20_000,
    out: Out = RESULTS / "selection.json",
) -> None:
    """Seconds and peak memory of an arrival, by its number of rows."""
    runs = [alone(choose_and_train, number, score, keep, max_scored) for number in rows or NUMBERS_OF_ROWS]
    write_result(out, {"score": score, "keep": keep, "max_scored": max_scored, "runs": runs})


def _seconds(base: BaseModel, rows: Dataset, setup: TrainingSetup, parent: Path, folder: Path) -> tuple[float, float]:
    """Seconds before the training, and of a step, for one arrival."""
    started = time.perf_counter()
    if setup.method.selection.is_on:
        chosen = choose_rows(rows, setup, lambda: base, parent_folder=parent, journal=folder / "selection.json")
        rows = rows.select(chosen.rows)
    before = time.perf_counter() - started
    return before, train_into(folder / "version", base, rows, setup, parent).seconds / STEPS


@app.command()
def options(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    rows: Annotated[int, typer.Option(help="Training rows of the arrival.")] = 300,
    repeats: Annotated[int, typer.Option(help="Trials of every option.")] = 3,
    base: Base = DEFAULT_BASE,
    out: Out = RESULTS / "option_seconds.json",
) -> None:
    """Median seconds of every option before the training, and of a step."""
    disable_progress_bars()
    first, second = NOISY_TASKS[1], NOISY_TASKS[0]
    suite, model = load_suite(data, (first, second)), load_base(base, HomeSettings().cache_dir)
    train = TrainConfig(max_prompt_tokens=160, checkpoint_steps=0, max_steps=STEPS)
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        parent = Path(temporary) / "parent"
        setup = TrainingSetup(
            task=suite[first].schema, strategy="deal", adapter=AdapterConfig(), method=MethodConfig(), train=train
        )
        train_into(parent, model, Dataset.from_list(list(suite[first].train[:rows])), setup)
        arrival = Dataset.from_list(list(suite[second].train[:rows]))
        later = replace(setup, task=suite[second].schema, old_tasks=(suite[first].schema,))
        for number in range(repeats):
            for name in random.Random(number).sample(list(OPTIONS), len(OPTIONS)):
                of_option = replace(later, method=OPTIONS[name])
                folder = Path(temporary) / f"{number}-{len(seconds[name])}-{list(OPTIONS).index(name)}"
                folder.mkdir()
                seconds[name].append(_seconds(model, arrival, of_option, parent, folder))
    medians = {
        name: dict(zip(("before", "step"), map(statistics.median, zip(*trials, strict=True)), strict=True))
        for name, trials in seconds.items()
    }
    settings = {
        "base": model.name,
        "task": second,
        "rows": rows,
        "kept": KEPT,
        "n": repeats,
        "max_prompt_tokens": train.max_prompt_tokens,
    }
    write_result(out, {**settings, "options": medians})


def found_in(features_ND: Any, labels: list[str], wrong: set[int]) -> dict[str, Any]:
    """Figures of one task with wrong labels: how many rows are suspected, and how many of these are wrong."""
    checked = suspected_labels(features_ND, labels, seed=0)
    return {
        "wrong": len(wrong),
        "suspected": len(checked.suspects),
        "suspected_and_wrong": sum(suspect.row in wrong for suspect in checked.suspects),
        "agreement": checked.agreement,
        "skill": checked.skill,
    }


@app.command()
def label_noise(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    task: Annotated[list[str] | None, typer.Option(help="Tasks.", show_default=", ".join(NOISY_TASKS))] = None,
    rows: Annotated[int, typer.Option(help="Training rows per task; the first rows are used.")] = 300,
    base: Base = DEFAULT_BASE,
    out: Out = RESULTS / "label_noise.json",
) -> None:
    """How many wrong labels are found in each task, by their share."""
    disable_progress_bars()
    names = tuple(task or NOISY_TASKS)
    suite, model = load_suite(data, names), load_base(base, HomeSettings().cache_dir)
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        features_ND = features(
            model.model,
            model.tokenizer,
            suite[name].schema,
            [row["input"] for row in suite[name].train[:rows]],
            max_prompt_tokens=TrainConfig().max_prompt_tokens,
        )
        figures[name] = {}
        for share in WRONG_SHARES:
            noisy = corrupted(suite[name], share, 0)[:rows]
            wrong = {number for number, row in enumerate(noisy) if "was" in row}
            figures[name][str(share)] = found_in(features_ND, [row["label"] for row in noisy], wrong)
        typer.echo(f"{name}: {figures[name]}")
    write_result(out, {"base": model.name, "rows": rows, "tasks": figures})


if __name__ == "__main__":
    app()
