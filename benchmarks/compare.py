"""Compare strategies on a suite of tasks: every strategy with every setting, order and seed is one cell.

    python -m benchmarks.compare --data TASKS --suite 4 --strategy deal --strategy replay
    python -m benchmarks.compare --data TASKS --task bank --task clinic

A cell is one file in a folder. A cell that is there is not run again, and several processes with the same folders share
the work. At the end the command prints a table of all cells in the folder for each suite and protocol.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import disable_progress_bars
from pydantic import TypeAdapter
from rich.console import Console

from benchmarks.cells import make_cell_file
from benchmarks.continual.cell import PROTOCOL, Cell, make_cell
from benchmarks.continual.suites import digest_of, load_suite, order_of, tasks_folder
from benchmarks.continual.summary import method_name, read_cells, summarise, tables
from benchmarks.output import Base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig
from deal_pipeline.cli.render import render
from tasks.adaptation.run import identify_base

LOOK_SECONDS = 2.0
LONGER = {"superni": {"max_prompt_tokens": 512}, "superni8": {"max_prompt_tokens": 512}}
"""Other defaults by suite: the instructions of superni alone take more than 160 tokens. The field cuts at 512."""
app = typer.Typer(help=__doc__)


def cells_of(
    data: Path,
    sequences: Sequence[tuple[str, ...]],
    strategies: Sequence[str],
    methods: Sequence[MethodConfig],
    seeds: Sequence[int],
    *,
    train: TrainConfig,
    **fields: Any,
) -> list[tuple[Cell, MethodConfig]]:
    """Return every cell once, with its settings. A strategy that does not read the settings that differ has one cell.

    Args:
        data: Folder of the tasks.
        sequences: Orders of tasks.
        strategies: Strategies, or bounds.
        methods: Settings to compare.
        seeds: Seeds of weights and of the order of rows.
        train: Settings of the training.
        fields: Further fields of all cells.

    Raises:
        ConfigError: There is no such strategy.
        DataValidationError: A task cannot be read, or has no test rows in the part to score on.
    """
    cells: dict[str, tuple[Cell, MethodConfig]] = {}
    for tasks in sequences:
        suite = load_suite(data, tasks)
        for task in suite.values():
            task.part(fields["part"])  # refuses an empty part before anything is trained
        for seed, strategy, method in product(seeds, strategies, methods):
            seeded, digest = replace(train, seed=seed), digest_of(suite)
            cell = make_cell(strategy, tasks, method=method, seed=seed, train=seeded, data=digest, **fields)
            cells.setdefault(cell.file_name, (cell, method))
    return list(cells.values())


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="Folder of tasks, or hf://datasets/OWNER/NAME.", show_default=False)],
    suite: Annotated[str | None, typer.Option(help="3, 4, 8, 9 or 15 (labels), superni or superni8 (texts).")] = None,
    order: Annotated[list[str] | None, typer.Option(help="Orders of the suite.", show_default="1")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Tasks of your own, in order.", show_default=False)] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="A strategy, or for comparison: base, per_task, joint.", show_default="deal, seq_lora"),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.", show_default="0")] = None,
    rows: Annotated[int, typer.Option(help="Training rows per task.", min=1)] = 300,
    part: Annotated[str, typer.Option(help="Test rows: dev (for choosing settings) or reported.")] = "reported",
    max_test_rows: Annotated[int | None, typer.Option(help="Use only the first N test rows.", min=1)] = None,
    scored: Annotated[
        str, typer.Option(help="Entries of the accuracy matrix: all, ends (diagonal and end) or last.")
    ] = "all",
    scoring: Annotated[
        str, typer.Option(help="Answers of tasks with labels: generated, or the likeliest label, which is faster.")
    ] = "generated",
    scores_unused: Annotated[
        bool, typer.Option("--scores-unused", help="Score the last version on unused training rows too.")
    ] = False,
    keep_versions: Annotated[Path | None, typer.Option(help="Keep the versions of finished cells here.")] = None,
    prompt: Annotated[str, typer.Option(help="Prompts: plain, or chat (the base model's chat template).")] = "plain",
    adapter: Annotated[str, typer.Option(help="Changes to the adapter's shape, as JSON.")] = "{}",
    train: Annotated[str, typer.Option(help="Changes to the training settings, as JSON.")] = "{}",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Changes to the methods' settings, as JSON. Repeat it to compare several."),
    ] = None,
    base: Base = DEFAULT_BASE,
    out: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("benchmark-cells"),
    work: Annotated[Path, typer.Option(help="Unfinished cells; a second call goes on with them.")] = Path(
        "benchmark-work"
    ),
) -> None:
    """Run the missing cells, and print the tables."""
    disable_progress_bars()
    if (suite is None) == (not task):
        raise typer.BadParameter("Give either a suite or tasks of your own.")
    model, folder = identify_base(base), tasks_folder(data)
    waiting = cells_of(
        folder,
        [tuple(task)] if task else [order_of(str(suite), name) for name in order or ["1"]],
        strategy or ["deal", "seq_lora"],
        [TypeAdapter(MethodConfig).validate_python(json.loads(text)) for text in method or ["{}"]],
        seed or [0],
        train=TrainConfig(**{**PROTOCOL, **LONGER.get(suite or "", {}), **json.loads(train)}),
        adapter=AdapterConfig(**json.loads(adapter)),
        rows=rows,
        part=part,
        max_test_rows=max_test_rows,
        scored=scored,
        scoring=scoring,
        scores_unused=scores_unused,
        prompt=prompt,
        base=f"{model.name} {model.sha256}",
    )
    while waiting:
        busy = []
        for cell, settings in waiting:
            status = make_cell_file(model, cell, settings, folder, out, work, keep_versions)
            if status == "busy":
                busy.append((cell, settings))
            else:
                typer.echo(f"{cell.file_name}: {status}")
        if len(busy) == len(waiting):  # other processes hold these cells: wait until they are stored or free again
            time.sleep(LOOK_SECONDS)
        waiting = busy
    console = Console()
    for table in tables(read_cells(out)):
        shared = json.loads(table.key)
        title = f"Suite {table.suite}, {shared[0]} training rows a task, {shared[1]} test rows"
        console.print(*render(map(_row, summarise(table)), title), sep="\n")


def _row(figures: Mapping[str, Any]) -> dict[str, Any]:
    difference = figures.get("difference_points_ci95")
    return {
        "strategy": method_name(figures["strategy"], figures["changes"]),
        "order": " and ".join(figures["orders"]),
        "runs": figures["num_cells"],
        "AA": figures["average_accuracy"],
        "forgetting": figures["forgetting"],
        "BWT": figures["backward_transfer"],
        "FWT": figures["forward_transfer"],
        "AA minus deal (95 % CI)": difference and "{:+.1f} ({:+.1f} to {:+.1f})".format(*difference),
    }


if __name__ == "__main__":
    app()
