"""Adapt and consolidate every five arrivals, against adapting alone and against retraining on all rows each time.

    python -m benchmarks.consolidation run --data TASKS --order 1 --order 2 --seed 100 --seed 101
    python -m benchmarks.consolidation page

`run` makes the missing cells; several processes share the work. `page` writes benchmarks/consolidation.md from the
cells that there are.

Protocol: suite 9, its two orders, 150 training rows a task, development rows, the likeliest label as the answer. There
is no gate: each version continues the one before it. Retraining learns all rows of all arrivals from the base model
each time. Only its last training is run, since the accuracy in the end is all that is compared; the steps of the others
are counted by their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from datasets import disable_progress_bars

from benchmarks.cells import benchmark_cell, make_cell_file
from benchmarks.continual.suites import name_of, order_of
from benchmarks.continual.summary import (
    CellJson,
    average_accuracy,
    interval_over_rows,
    matrix_of,
    paired,
    read_cells,
    round_alike,
)
from benchmarks.output import RESULTS, Base, templates
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import TrainConfig
from deal_core.method_config import MethodConfig
from tasks.adaptation.run import identify_base

CELLS = RESULTS / "consolidation"
PAGE = Path("benchmarks/consolidation.md")
SUITE, NUM_ROWS, EVERY = "9", 150, 5
ARMS: dict[str, tuple[str, int | None]] = {
    "adapt": ("deal", None),
    "every-5": ("deal", EVERY),
    "retrain": ("joint", None),
}
"""Arm → its strategy, and after how many arrivals it is consolidated."""
app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    arm: Annotated[list[str] | None, typer.Option(help="Arms.", show_default=", ".join(ARMS))] = None,
    order: Annotated[list[str] | None, typer.Option(help="Orders of the suite.", show_default="1")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.", show_default="100")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Tasks of your own, in order.", show_default="suite 9")] = None,
    rows: Annotated[int, typer.Option(help="Training rows per task.")] = NUM_ROWS,
    every: Annotated[
        int, typer.Option(help="Arrivals from one consolidation to the next, of the arm every-5.")
    ] = EVERY,
    base: Base = DEFAULT_BASE,
    work: Annotated[Path, typer.Option(help="Unfinished cells; a second call goes on with them.")] = Path(
        "consolidation-work"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the cells; each arm has a folder in it.")] = CELLS,
) -> None:
    """Run the missing cells of some arms."""
    disable_progress_bars()
    model = identify_base(base)
    for number, chain, name in ((s, o, a) for s in seed or [100] for o in order or ["1"] for a in arm or ARMS):
        strategy, consolidates = ARMS[name]
        tasks = tuple(task) if task else order_of(SUITE, chain)
        cell = benchmark_cell(
            strategy,
            MethodConfig(),
            tasks,
            base=model,
            data=data,
            seed=number,
            rows=rows,
            consolidate_every=every if consolidates else None,
        )
        (out / name).mkdir(parents=True, exist_ok=True)
        status = make_cell_file(model, cell, MethodConfig(), data, out / name, work)
        typer.echo(f"{name}, order {chain}, seed {number}: {status}")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one arm, means over its cells."""

    arm: str
    num_cells: int
    accuracy: float
    """Mean accuracy over the tasks in the end, in percent."""
    forgetting: float | None
    """In points; None: retraining has no versions in between."""
    largest_debt: float | None
    """The most that a task has lost since it was learned, in points."""
    steps: float
    """Optimiser steps of all trainings."""
    rows: float
    """Rows that these steps read, with rehearsed ones."""
    difference: Sequence[float] | None
    """Points by which its accuracy beats that of adapting alone, with the 95 % interval over test rows."""


def figures_of(arm: str, cells: Sequence[CellJson], plain: Sequence[CellJson]) -> Figures:
    """Return the figures of an arm; `plain` are the cells of adapting alone."""
    matrices = [matrix for cell in cells if (matrix := matrix_of(cell)) is not None]
    debts = [
        max((matrix.rows[row][column] or 0) - (matrix.rows[-1][column] or 0) for column, row in best)
        for matrix in matrices
        if (best := [(matrix.tasks.index(name), row) for name, row in matrix.learned_best().items()])
    ]
    forgetting = [matrix.forgetting for matrix in matrices if matrix.forgetting is not None]
    return Figures(
        arm=arm,
        num_cells=len(cells),
        accuracy=fmean(map(average_accuracy, cells)),
        forgetting=100 * fmean(forgetting) if forgetting else None,
        largest_debt=100 * fmean(debts) if debts else None,
        steps=fmean(sum(_steps(cell)) for cell in cells),
        rows=fmean(map(_rows_read, cells)),
        difference=_difference(cells, plain) if arm != "adapt" else None,
    )


def _difference(cells: Sequence[CellJson], plain: Sequence[CellJson]) -> list[float] | None:
    """The mean accuracy of cells in the end minus that of adapting alone, with its interval; None: nothing compares.

    Cells are compared with those of the same order and seed. Retraining has no order, so it is compared with all.
    """
    seeds = {cell["settings"]["seed"] for cell in cells} & {cell["settings"]["seed"] for cell in plain}
    if cells and cells[0]["settings"]["strategy"] == "joint":
        sides = [[cell for cell in side if cell["settings"]["seed"] in seeds] for side in (cells, plain)]
    else:
        sides = [list(side) for side in zip(*paired(cells, plain).values(), strict=True)]
    return [*interval_over_rows(*sides).in_points().values()] if sides and all(sides) else None


def _steps(cell: CellJson) -> list[int]:
    """The optimiser steps of every training of an arm. Retraining learns the first task, the first two, and so on."""
    settings = cell["settings"]
    if settings["strategy"] != "joint":
        return [version["num_steps"] for version in cell["versions"]]
    names = ("num_epochs", "max_steps", "batch_size", "gradient_accumulation_steps")  # what decides the number
    train = TrainConfig(**{name: settings["train"][name] for name in names})
    return [train.num_steps(number * settings["rows"]) for number in range(1, len(settings["tasks"]) + 1)]


def _rows_read(cell: CellJson) -> int:
    """The rows that all steps of an arm read. A step of an arrival after the first has rehearsed rows too."""
    settings, steps = cell["settings"], _steps(cell)
    train = settings["train"]
    num_rehearsed = 0
    if settings["strategy"] != "joint":
        arrivals = [version["num_steps"] for version in cell["versions"] if version["task"]]
        num_rehearsed = settings["method"]["rehearsal.per_step"] * sum(arrivals[1:])
    return sum(steps) * train["batch_size"] * train["gradient_accumulation_steps"] + num_rehearsed


@app.command()
def page(
    cells: Annotated[Path, typer.Option(help="Folder of the arms' cells.")] = CELLS,
    out: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Write the page of the figures, and print it."""
    if not cells.is_dir():
        raise typer.BadParameter(f"{cells} is not there; run some arms first.")
    stored = {name: read_cells(cells / name) for name in ARMS if (cells / name).is_dir()}
    all_cells = [cell for arm in stored.values() for cell in arm]
    settings = all_cells[0]["settings"]
    suite = name_of(tuple(settings["tasks"]))[0]
    text = (
        templates()
        .get_template("consolidation.md.j2")
        .render(
            arms=[figures_of(name, arm, stored.get("adapt", [])) for name, arm in stored.items() if arm],
            suite=suite,
            num_tasks=len(settings["tasks"]),
            rows=settings["rows"],
            base=settings["base"].partition(" ")[0],
            every=next((cell["settings"]["consolidate_every"] for cell in stored.get("every-5", [])), EVERY),
            orders=sorted({name_of(tuple(cell["settings"]["tasks"]))[1] for cell in all_cells} - {"any"}),
            seeds=sorted({cell["settings"]["seed"] for cell in all_cells}),
            one_processor=all(round_alike(cell, all_cells[0]) for cell in all_cells),
        )
    )
    out.write_text(text, encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    app()
