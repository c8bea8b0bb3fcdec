"""`deal benchmark`: strategies compared on a suite of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Option

from flows.cli.console import heading, interval, new_table, points
from flows.cli.session import CommandResult, Session, command

if TYPE_CHECKING:
    from flows.benchmark import BenchmarkResult

benchmark_app = typer.Typer()


@command(benchmark_app, "starting")
def benchmark(
    deal: Session,
    data: Annotated[
        str, Option("--data", "-d", help="Folder of tasks, or hf://datasets/OWNER/NAME.", show_default=False)
    ],
    suite: Annotated[str | None, Option(
        "--suite", help="3, 4, 8, 9 or 15 (labels), superni or superni8 (texts).", show_default=False
    )] = None,
    order: Annotated[list[str] | None, Option("--order", help="Order of the suite's tasks.", show_default="1")] = None,
    task: Annotated[list[str] | None, Option("--task", "-t", help="Tasks of your own, in order.")] = None,
    strategy: Annotated[list[str] | None, Option(
        "--strategy",
        help="A strategy, or a bound: base, frozen_head, knn, knn_means, per_task, joint_memory, joint.",
        show_default="deal, seq_lora"
    )] = None,
    seed: Annotated[list[int] | None, Option("--seed", help="Seed of weights and row order.", show_default="0")] = None,
    rows: Annotated[int, Option("--rows", help="Training rows per task.")] = 300,
    part: Annotated[str, Option("--part", help="Test rows: dev (for choosing settings) or reported.")] = "reported",
    max_test_rows: Annotated[
        int | None, Option("--max-test-rows", help="Use only the first N test rows.", show_default="all")
    ] = None,
    scored: Annotated[
        str, Option("--scored", help="Entries of the accuracy matrix: all, ends (diagonal and end) or last.")
    ] = "all",
    prompt: Annotated[
        str, Option("--prompt", help="Prompts: plain, or chat (the base model's chat template).")
    ] = "plain",
    adapter: Annotated[
        str, Option("--adapter", help="Changes to the adapter's shape, as JSON: rank, alpha, target_modules.")
    ] = "{}",
    train: Annotated[str, Option("--train", help="Changes to the training settings, as JSON.")] = "{}",
    method: Annotated[list[str] | None, Option(
        "--method", help="Changes to the methods' settings, as JSON. Repeat it to compare several."
    )] = None,
    base: Annotated[str | None, Option("--base", help="Base model.", show_default="smollm2-135m-instruct")] = None,
    out: Annotated[Path | None, Option("--out", help="Folder of the cells.", show_default="HOME/benchmark")] = None,
) -> CommandResult:
    """Compare strategies on a suite of tasks. Finished cells are kept; several commands can share the work."""
    from flows.benchmark import benchmark as benchmark_flow
    from flows.benchmark import spec_from_options

    spec = spec_from_options(
        data=data, suite=suite, orders=order, tasks=task, strategies=strategy, seeds=seed, rows=rows,
        part=part, max_test_rows=max_test_rows, scored=scored, prompt=prompt, base_model=base, out=out,
        adapter=adapter, train=train, methods=method or [],
    )
    outcome = deal.run(lambda: benchmark_flow(spec), trains=True)
    return CommandResult(outcome, show_benchmark(outcome), failed=outcome.num_failed > 0)


def show_benchmark(result: BenchmarkResult) -> Sequence[RenderableType]:
    """A table per suite, and the cells that failed."""
    from deal_core.benchmark.summary import method_name

    shown: list[RenderableType] = []
    numbers = ["cells", "AA", "forgetting", "BWT", "FWT", "AA minus deal (95 % CI)"]
    for found in result.tables:
        table = new_table("strategy", "order", *numbers, right=numbers)
        for row in found["rows"]:
            table.add_row(
                escape(method_name(row["strategy"], row["changes"])),
                " and ".join(row["orders"]), str(row["num_cells"]),
                *(points(row[name]) for name in ("average_accuracy", "forgetting", "backward_transfer",
                                                 "forward_transfer")),
                interval(row.get("difference_points_ci95")),
            )
        rows, part = found["protocol"][:2]
        shown += [heading(f"Suite {found['suite']}, {rows} training rows a task, {part} test rows"), table]
    shown += [f"[red]{escape(f'{cell.file}: {cell.message}')}[/]" for cell in result.cells if cell.status == "failed"]
    return shown
