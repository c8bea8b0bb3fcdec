"""Commands for comparisons and base models: `deal benchmark` and `deal model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from flows.cli.console import heading, interval, new_table, points
from flows.cli.session import CommandResult, Session, command, main_app

if TYPE_CHECKING:
    from flows.benchmark import BenchmarkResult

model_app = typer.Typer(help="Fetch a base model.", no_args_is_help=True)


@model_app.callback()
def _model() -> None:
    """Keep `fetch` a subcommand: with one command, typer would make it the group itself."""


@dataclass(frozen=True, kw_only=True)
class FetchedBase:
    """A base model that runs can use without a network."""

    source: str
    """The name, Hub id, folder or file that was given."""
    folder: str
    """The folder that it is in."""


@command(model_app, "fetch", "deal model fetch", "deal model fetch HuggingFaceTB/SmolLM2-360M-Instruct")
def fetch(
    deal: Session,
    source: Annotated[str, Argument(help="Built-in name, Hub id, local folder or GGUF file.")] = (
        "smollm2-135m-instruct"
    ),
) -> CommandResult[FetchedBase]:
    """Fetch, check and convert a base model, so that runs need no network."""
    from deal_core.base_model.sources import resolve_base
    from infra.settings import HomeSettings

    folder = resolve_base(
        source, HomeSettings().cache_dir, lambda doing, done, total: deal.screen.advanced("fetch", done, total, doing)
    )
    return CommandResult(FetchedBase(source=source, folder=str(folder)), [escape(f"{source} is in {folder}")])


@command(
    main_app,
    "starting",
    "deal benchmark --data TASKS --suite 4",
    "deal benchmark --data TASKS --task bank --task clinic --strategy deal --strategy replay",
)
def benchmark(
    deal: Session,
    data: Annotated[
        str, Option("--data", "-d", help="Folder of tasks, or hf://datasets/OWNER/NAME.", show_default=False)
    ],
    suite: Annotated[
        str | None, Option(help="3, 4, 8, 9 or 15 (labels), superni or superni8 (texts).", show_default=False)
    ] = None,
    order: Annotated[list[str] | None, Option(help="Order of the suite's tasks.", show_default="1")] = None,
    task: Annotated[list[str] | None, Option("--task", "-t", help="Tasks of your own, in order.")] = None,
    strategy: Annotated[
        list[str] | None,
        Option(
            help="A strategy, or for comparison: base, per_task, joint.",
            show_default="deal, seq_lora",
        ),
    ] = None,
    seed: Annotated[list[int] | None, Option(help="Seed of weights and row order.", show_default="0")] = None,
    rows: Annotated[int, Option(help="Training rows per task.")] = 300,
    part: Annotated[str, Option(help="Test rows: dev (for choosing settings) or reported.")] = "reported",
    max_test_rows: Annotated[int | None, Option(help="Use only the first N test rows.", show_default="all")] = None,
    scored: Annotated[
        str, Option(help="Entries of the accuracy matrix: all, ends (diagonal and end) or last.")
    ] = "all",
    scoring: Annotated[
        str, Option(help="Answers of tasks with labels: generated, or the likeliest label, which is faster.")
    ] = "generated",
    scores_unused: Annotated[
        bool, Option("--scores-unused", help="Score the last version on unused training rows too.")
    ] = False,
    keep_versions: Annotated[
        Path | None, Option(help="Keep the versions of finished runs in this folder.", show_default=False)
    ] = None,
    prompt: Annotated[str, Option(help="Prompts: plain, or chat (the base model's chat template).")] = "plain",
    adapter: Annotated[
        str, Option(help="Changes to the adapter's shape, as JSON: rank, alpha, target_modules.")
    ] = "{}",
    train: Annotated[str, Option(help="Changes to the training settings, as JSON.")] = "{}",
    method: Annotated[
        list[str] | None,
        Option(help="Changes to the methods' settings, as JSON. Repeat it to compare several."),
    ] = None,
    base: Annotated[str | None, Option(help="Base model.", show_default="smollm2-135m-instruct")] = None,
    out: Annotated[Path | None, Option(help="Folder of the runs.", show_default="HOME/benchmark")] = None,
) -> CommandResult[BenchmarkResult]:
    """Compare strategies on a suite of tasks.

    Finished runs are kept, and several commands can share the work.
    """
    from flows.benchmark import benchmark as benchmark_flow
    from flows.benchmark import spec_from_options

    spec = spec_from_options(
        data=data,
        suite=suite,
        orders=order,
        tasks=task,
        strategies=strategy,
        seeds=seed,
        rows=rows,
        part=part,
        max_test_rows=max_test_rows,
        scored=scored,
        scoring=scoring,
        scores_unused=scores_unused,
        keep_versions=keep_versions,
        prompt=prompt,
        base_model=base,
        out=out,
        adapter=adapter,
        train=train,
        methods=method or [],
    )
    outcome = deal.run(lambda: benchmark_flow(spec), trains=True)
    return CommandResult(outcome, _show_benchmark(outcome), failed=outcome.num_failed > 0)


def _show_benchmark(result: BenchmarkResult) -> Sequence[RenderableType]:
    from deal_core.benchmark.summary import method_name

    shown: list[RenderableType] = []
    numbers = ["runs", "AA", "forgetting", "BWT", "FWT", "AA minus deal (95 % CI)"]
    for benchmark_table in result.tables:
        table = new_table("strategy", "order", *numbers, right=numbers)
        for row in benchmark_table.rows:
            table.add_row(
                escape(method_name(row.strategy, row.changes)),
                " and ".join(row.orders),
                str(row.num_cells),
                points(row.average_accuracy),
                points(row.forgetting),
                points(row.backward_transfer),
                points(row.forward_transfer),
                interval(row.difference_points_ci95),
            )
        rows, part = benchmark_table.protocol[:2]
        shown += [heading(f"Suite {benchmark_table.suite}, {rows} training rows a task, {part} test rows"), table]
    shown += [f"[red]{escape(f'{cell.file}: {cell.message}')}[/]" for cell in result.cells if cell.status == "failed"]
    return shown
