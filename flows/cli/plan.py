"""Commands that learn nothing: `deal validate` and `deal plan` before a run, `deal model`, and `deal benchmark`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.safe_text import listed, shorten
from flows.cli.console import heading, interval, new_table, points
from flows.cli.session import CommandResult, Session, command, main_app

if TYPE_CHECKING:
    from flows.benchmark import BenchmarkResult
    from tasks.planning import PlanResult
    from tasks.validate import ShownRow, ValidateResult

_SHOWN_CHARS = 1000
_SHOWN_LABELS = 20
model_app = typer.Typer(help="Base models.", no_args_is_help=True)


@command(main_app, "reading")
def plan(
    deal: Session,
    spec: Annotated[Path, Argument(help="Spec file (YAML).", show_default=False)],
    device_memory: Annotated[
        str | None, Option(help="Plan for another machine: 24GiB, 80GB.", show_default="what is free here")
    ] = None,
    precision: Annotated[str, Option(help="Precision of the weights: bf16, fp32, or auto (this machine's).")] = "auto",
    probe: Annotated[
        bool, Option("--probe/--no-probe", help="Time three training steps if the base model is on this machine.")
    ] = True,
) -> CommandResult:
    """Say what a run will take (memory, steps, time) and whether it fits. Fetches no weights and stores nothing."""
    from flows.server.embedded import calm_libraries
    from tasks.lineage.settings import spec_from_options
    from tasks.planning import plan as plan_run

    calm_libraries()
    asked = spec_from_options(deal.store, spec, task=None, data=None, test_data=None)
    found = plan_run(
        asked,
        device_memory=device_memory,
        precision=precision,
        probe=probe,  # type: ignore[arg-type]
        on_progress=deal.screen.stage_started,
    )
    return CommandResult(found, _show_plan(found), failed=found.refused)


@command(model_app, "fetch")
def fetch(
    deal: Session,
    source: Annotated[str, Argument(help="Built-in name, Hub id, local folder or GGUF file.")] = (
        "smollm2-135m-instruct"
    ),
) -> CommandResult:
    """Fetch, check and convert a base model, so that runs need no network."""
    from deal_core.base_model.sources import resolve_base
    from infra.settings import HomeSettings

    folder = resolve_base(
        source, HomeSettings().cache_dir, lambda doing, done, total: deal.screen.advanced("fetch", done, total, doing)
    )
    return CommandResult({"source": source, "folder": str(folder)}, [escape(f"{source} is in {folder}")])


_VERDICTS = {
    "fits": "[bold green]fits[/]",
    "tight": "[bold yellow]fits, with less than a tenth to spare[/]",
    "refused": "[bold red]cannot fit[/]",
}


def _show_plan(found: PlanResult) -> Sequence[RenderableType]:
    total = sum(found.parameters.values())
    kinds = ", ".join(f"{count / 1e6:,.1f} M {kind}" for kind, count in found.parameters.items() if count)
    rehearsed = f" and {found.rehearsed_per_step} questions about old tasks" if found.rehearsed_per_step else ""
    chosen = f" ({found.num_chosen} chosen)" if found.num_chosen < found.num_train else ""
    source = "of these rows" if found.lengths_from == "rows" else "by the spec's limits"
    shown: list[RenderableType] = [
        f"Base model  {escape(found.base)} ({escape(found.model_type)}, {found.precision}): "
        f"{total / 1e6:,.1f} M parameters: {kinds}",
        f"Adapter     {found.strategy}, rank {found.rank}: {found.adapter_parameters / 1e6:,.2f} M parameters",
        f"Rows        {found.num_train} training{chosen}, {found.num_test} test, {found.num_rejected} bad; "
        f"{found.rows_per_step} a step{rehearsed}",
        f"Longest     {found.longest_row_tokens} tokens, {found.longest_answer_tokens} of them answer, {source}; "
        f"{found.batch_rows} rows at once",
        f"Steps       {found.num_steps}" + _time(found),
        heading("Memory at the peak of a step"),
    ]
    table = new_table("kind", "size", right=["size"])
    for kind, size in found.memory.items():
        table.add_row(kind, in_bytes(size))
    table.add_row("[bold]all[/]", f"[bold]{in_bytes(found.total_bytes)}[/]")
    shown += [
        table,
        f"It {_VERDICTS[found.verdict]}: {in_bytes(found.total_bytes)} of {in_bytes(found.device_bytes)} "
        f"({escape(found.device)}).",
    ]
    if found.refused:
        shown += _remedies(found)
    return [*shown, *(f"[yellow]{escape(note)}[/]" for note in found.notes)]


def in_bytes(size: int) -> str:
    """A size in MiB or GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _time(found: PlanResult) -> str:
    if found.expected_seconds is None or found.seconds_per_step is None:
        return ""
    minutes, seconds = divmod(round(found.expected_seconds), 60)
    length = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f", about {length} of training ({found.seconds_per_step:.2f} s a step, from a probe)"


def _remedies(found: PlanResult) -> list[RenderableType]:
    certain = sum(found.memory[kind] for kind in ("weights", "adapter", "optimiser"))
    shown: list[RenderableType] = []
    if certain > found.device_bytes:
        shown.append(f"Weights, adapter and optimiser alone take {in_bytes(certain)}, whatever the batch.")
    table = new_table("change", "then takes", "", right=["then takes"])
    for each in found.remedies:
        table.add_row(escape(each.change), in_bytes(each.total_bytes), "[green]fits[/]" if each.fits else "too much")
    if found.remedies:
        shown += [heading("What to change"), table]
    if not any(each.fits for each in found.remedies):
        shown.append("No setting makes it fit: take a smaller base model, or a device with more memory.")
    return shown


@command(main_app, "validate")
def validate(
    deal: Session,
    file: Annotated[str, Argument(help="File, folder, pattern or address: CSV, JSON lines or Parquet.")],
    spec: Annotated[Path | None, Option(help="Spec whose task and data settings apply.", show_default=False)] = None,
    task: Annotated[
        str | None,
        Option("--task", "-t", help="Task the file belongs to.", show_default="task.yaml in the file's folder"),
    ] = None,
    test_data: Annotated[str | None, Option(help="File or folder of test rows.", show_default="the spec's")] = None,
    lineage: Annotated[
        str | None,
        Option("--lineage", "-l", help="Lineage that will learn the file.", show_default="the spec's, else default"),
    ] = None,
    with_model: Annotated[
        bool, Option("--with-model", help="Also let the base model look for wrong labels; takes time.")
    ] = False,
) -> CommandResult:
    """Check a file as a run would check it. Nothing is stored."""
    from tasks.validate import validate as validate_rows

    outcome = validate_rows(
        file,
        spec=spec,
        task=task,
        lineage=lineage,
        test_data=test_data,
        with_model=with_model,
        on_progress=lambda done: deal.screen.advanced("validate", done, None),
        on_model=lambda done, total: deal.screen.advanced("labels", done, total),
    )
    return CommandResult(outcome, show_validation(outcome), failed=not outcome.accepted)


def _show_row(row: ShownRow) -> Sequence[RenderableType]:
    def shown(text: str) -> str:
        is_short = len(text) <= _SHOWN_CHARS
        return escape(text if is_short else f"{text[: _SHOWN_CHARS // 2]} … {text[-_SHOWN_CHARS // 2 :]}")

    worse = [f"rather than:[red]{shown(row.rejected)}[/]"] if row.rejected is not None else []
    note = [f"[yellow]{escape(row.note)}[/]"] if row.note else []
    return [f"{shown(row.prompt)}[green]{shown(row.answer)}[/]", *worse, *note]


def show_validation(result: ValidateResult) -> Sequence[RenderableType]:
    """The result of the checks of a file."""
    verdict = "[green]can be adapted[/]" if result.accepted else "[red]is refused[/]"
    shown: list[RenderableType] = [
        f"{escape(result.file)} {verdict}: {result.num_read} rows read, {result.num_train} training, "
        f"{result.num_test} test, {result.num_rejected} bad"
        + (f"; {result.num_turns} training rows are earlier turns of chats" if result.num_turns else ""),
        *(
            [
                f"{result.num_several} rows have several right answers: the first one is learned, and the metric takes "
                "the best of them"
            ]
            if result.num_several
            else []
        ),
        *([f"settings of {escape(result.task_file)} apply"] if result.task_file else []),
        f"recognised as {escape(result.shape or 'no known shape: no row can be read')}",
        f"format {result.format}" + (f", labels {escape(listed(result.labels))}" if result.labels else ""),
    ]
    if result.example:
        shown += [heading("One row as the model sees it"), *_show_row(result.example)]
    if result.bad_rows:
        table = new_table("file", "row", "line", "reason", right=["row", "line"])
        for bad in result.bad_rows:
            line = "–" if bad.line is None else str(bad.line)
            table.add_row(escape(bad.file), str(bad.row), line, escape("\n".join(bad.reasons)))
        shown += [heading(f"Bad rows (the first {len(result.bad_rows)})"), table]
    if result.label_check is not None:
        shown.append(escape(result.label_check))
    if result.likely_wrong:
        table = new_table("text", "label", "likelier")
        for row in result.likely_wrong[:_SHOWN_LABELS]:
            table.add_row(*(escape(shorten(text)) for text in (row.text, row.label, row.likelier)))
        shown += [heading(f"Labels to look at (the first {table.row_count}; --json has all)"), table]
    shown += [f"[yellow]{escape(warning)}[/]" for warning in result.warnings]
    if result.refusal:
        shown.append(f"[red]{escape(result.refusal)}[/]")
    return shown


@command(main_app, "starting")
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
            help="A strategy, or a bound: base, frozen_head, knn, knn_means, per_task, joint_memory, joint.",
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
    prompt: Annotated[str, Option(help="Prompts: plain, or chat (the base model's chat template).")] = "plain",
    adapter: Annotated[
        str, Option(help="Changes to the adapter's shape, as JSON: rank, alpha, target_modules.")
    ] = "{}",
    train: Annotated[str, Option(help="Changes to the training settings, as JSON.")] = "{}",
    method: Annotated[
        list[str] | None,
        Option(help="Changes to the methods' settings, and the memory, as JSON. Repeat it to compare several."),
    ] = None,
    base: Annotated[str | None, Option(help="Base model.", show_default="smollm2-135m-instruct")] = None,
    out: Annotated[Path | None, Option(help="Folder of the cells.", show_default="HOME/benchmark")] = None,
) -> CommandResult:
    """Compare strategies on a suite of tasks. Finished cells are kept; several commands can share the work."""
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
    numbers = ["cells", "AA", "forgetting", "BWT", "FWT", "AA minus deal (95 % CI)"]
    for found in result.tables:
        table = new_table("strategy", "order", *numbers, right=numbers)
        for row in found["rows"]:
            table.add_row(
                escape(method_name(row["strategy"], row["changes"])),
                " and ".join(row["orders"]),
                str(row["num_cells"]),
                *(
                    points(row[name])
                    for name in ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer")
                ),
                interval(row.get("difference_points_ci95")),
            )
        rows, part = found["protocol"][:2]
        shown += [heading(f"Suite {found['suite']}, {rows} training rows a task, {part} test rows"), table]
    shown += [f"[red]{escape(f'{cell.file}: {cell.message}')}[/]" for cell in result.cells if cell.status == "failed"]
    return shown
