"""The `deal` command. Heavy imports happen inside commands, so that `deal --help` answers at once."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from deal_core.errors import ConfigError
from flows.cli.housekeeping import answer_file, keeping_app
from flows.cli.labels import labels_app
from flows.cli.plan import plan_app
from flows.cli.report import report_app
from flows.cli.serve import serve_app, vllm_app
from flows.cli.server import lineage_app, server_app
from flows.cli.session import FAILED, Debug, Home, Json, Lineage, Session, exit_if_rejected, session
from flows.cli.versions import promotion_app

app = typer.Typer(
    name="deal",
    help="Continual LoRA adaptation: files of new domains land, one adapter learns each without losing the last.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 3 rejected by the gate, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="Base models.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(lineage_app, name="lineage")

Base = Annotated[
    str | None,
    typer.Option("--base", help="Hub id, local folder or GGUF file.",
                 show_default="the lineage's own, else smollm2-135m-instruct"),
]  # fmt: skip
Strategy = Annotated[
    str | None,
    typer.Option("--strategy", help="deal, seq_lora, replay, o_lora, …",
                 show_default="the lineage's own, else deal"),
]  # fmt: skip
SpecLineage = Annotated[
    str | None,
    typer.Option("--lineage", "-l", help="Name of the lineage.", show_default="the spec's, else default"),
]
Version = Annotated[str | None, typer.Option("--version", help="Adapter version.", show_default="the champion")]


@app.command()
def demo(
    compare: Annotated[bool, typer.Option("--compare", help="The same arrivals also by plain continued LoRA.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="Another base model.", show_default="smollm2-135m-instruct")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Where the result's picture goes (PNG).", show_default="HOME/demo.png"),
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let three example domains arrive one after another and show what the adapter keeps of each."""
    with session(home, as_json, debug) as deal:

        def start() -> Any:
            from flows.cli.demo import run_demo

            return run_demo(picture=picture or deal.home / "demo.png", compare=compare, base_model=base)

        outcome = deal.run(start)
        from flows.cli.tables import show_demo

        deal.screen.result(outcome.model_dump(mode="json"), *show_demo(outcome, deal.home))
        if outcome.failed:
            raise typer.Exit(FAILED)
        exit_if_rejected(outcome.rejected)


@app.command()
def adapt(
    spec: Annotated[Path | None, typer.Argument(help="Spec file (YAML).", show_default=False)] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Task the file belongs to.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="File: CSV, JSON lines or Parquet.")] = None,
    test_data: Annotated[str | None, typer.Option("--test-data", help="File of test rows.")] = None,
    lineage: SpecLineage = None,
    base: Base = None,
    strategy: Strategy = None,
    again: Annotated[
        bool, typer.Option("--again", help="Train even if this arrival was adapted before, by this same command too.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Adapt the lineage's champion to one file: by a spec, or by --task and --data."""
    with session(home, as_json, debug) as deal:
        from tasks.context import current_store
        from tasks.lineage.resolve_spec import spec_from_options

        adapt_spec = spec_from_options(
            current_store(), spec, task=task, data=data, test_data=test_data,
            lineage=lineage, base_model=base, strategy=strategy,
        )  # fmt: skip

        def start() -> Any:
            from flows.adapt import adapt as adapt_flow

            return adapt_flow(adapt_spec, again=again)

        outcome = deal.run(start)
        from flows.cli.tables import show_adaptation

        deal.screen.result(outcome.model_dump(mode="json"), *show_adaptation(outcome))
        exit_if_rejected(outcome.rejected)


@app.command()
def watch(
    once: Annotated[bool, typer.Option("--once", help="Handle what is there, then end.")] = False,
    spec: Annotated[
        Path | None, typer.Option("--spec", help="Lineage settings (a spec without its task).", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="Only this task's files.", show_default="the lineage's tasks, else all"),
    ] = None,
    lineage: SpecLineage = None,
    base: Base = None,
    strategy: Strategy = None,
    poll: Annotated[float, typer.Option("--poll", min=0.1, help="Seconds between two looks at the inbox.")] = 2.0,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Adapt to files as they land in the inbox (STORE/inbox/TASK/FILE), each once."""
    with session(home, as_json, debug) as deal:
        from tasks.context import current_store
        from tasks.lineage.resolve_spec import watched_from_options

        watched = watched_from_options(
            current_store(), spec, tasks=task or None, lineage=lineage, base_model=base, strategy=strategy
        )

        def start() -> Any:
            from flows.watch import watch as watch_flow

            return watch_flow(watched, tasks=watched.tasks, once=once, poll_seconds=poll)

        outcome = deal.run(start)
        from flows.cli.tables import show_watch

        deal.screen.result(outcome.model_dump(mode="json"), *show_watch(outcome))
        if outcome.num_refused:
            raise typer.Exit(FAILED)
        exit_if_rejected(outcome.num_rejected > 0)


@app.command()
def evaluate(
    lineage: Lineage = "default",
    version: Version = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a version afresh on the frozen test rows of every task it knows."""
    with session(home, as_json, debug) as deal:

        def start() -> Any:
            from flows.evaluate import evaluate as evaluate_flow

            return evaluate_flow(lineage, version)

        outcome = deal.run(start)
        from flows.cli.tables import show_evaluation

        deal.screen.result(outcome.model_dump(mode="json"), *show_evaluation(outcome))


@app.command()
def history(
    lineage: Lineage = "default",
    at: Annotated[
        datetime | None,
        typer.Option("--at", metavar="TIME", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"],
                     help="Say which version was champion then, by this machine's clock: 2026-11-01T09:30, or a date.",
                     show_default=False),
    ] = None,
    moves: Annotated[bool, typer.Option("--moves", help="Show the promotion log instead.")] = False,
    newest: Annotated[
        int, typer.Option("--newest", "-n", help="So many versions, the newest ones; 0: all, as with --json.", min=0)
    ] = 30,
    home: Home = None, as_json: Json = False, debug: Debug = False,
) -> None:
    """List the versions of a lineage: task, scores, the gate's word, aliases; or who was champion when."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("reading"):
            from tasks.lineage.history import read_champion_at, read_history, read_moves

            if at is not None:
                champion = read_champion_at(lineage, at)
            elif moves:
                log = read_moves(lineage)
            else:
                entries = read_history(lineage, None if as_json else newest or None)
        if at is not None:
            text = f"version {champion} was champion" if champion else "no version was champion"
            deal.screen.result({"at": at.astimezone().isoformat(), "champion": champion}, f"At {at}, {text}.")
        elif moves:
            from flows.cli.versions import show_moves

            deal.screen.result([move.model_dump(mode="json") for move in log], *show_moves(lineage, log))
        else:
            from flows.cli.tables import show_history

            deal.screen.result([entry.model_dump(mode="json") for entry in entries], *show_history(lineage, entries))


@app.command()
def predict(
    text: Annotated[
        str | None, typer.Argument(help="Text to answer; - reads standard input.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="File whose rows are answered: CSV, JSON lines or Parquet.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Task to ask.", show_default="the newest one")
    ] = None,
    lineage: Lineage = "default",
    version: Version = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="With --data: .jsonl or .parquet.", show_default="beside the file"),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option("--column", help="With --data: the column that is asked.", show_default="found by its name"),
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a text, or every row of a file, with the lineage's champion."""
    with session(home, as_json, debug) as deal:
        if data is not None:
            answer_file(deal, text, data, lineage=lineage, task=task, version=version, out=out, column=column)
            return
        if text is None or out is not None or column is not None:
            raise ConfigError("Give a text to answer, or a file with --data; --out and --column go with a file.")
        if text == "-":
            text = typer.get_text_stream("stdin").read().strip()
        with deal.screen.working("predicting"):
            from flows.server.embedded import calm_libraries
            from tasks.serving.predict import predict as predict_answer

            calm_libraries()
            answer = predict_answer(text, lineage=lineage, task=task, version=version)
        deal.screen.result(answer.model_dump(mode="json"), escape(answer.answer))


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="File: CSV, JSON lines or Parquet.")],
    spec: Annotated[
        Path | None, typer.Option("--spec", help="Spec whose task and data settings apply.", show_default=False)
    ] = None,
    task: Annotated[str, typer.Option("--task", "-t", help="Task the file belongs to.")] = "unnamed",
    test_data: Annotated[
        str | None, typer.Option("--test-data", help="File of test rows.", show_default="the spec's")
    ] = None,
    lineage: Annotated[
        str | None,
        typer.Option("--lineage", "-l", help="Lineage that shall learn it.", show_default="the spec's, else default"),
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a file as ingest would, and keep nothing of it."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("validate"):
            from tasks.validate import validate as validate_rows

            outcome = validate_rows(
                file, spec=spec, task=task, lineage=lineage, test_data=test_data,
                on_progress=lambda done: deal.screen.advanced("validate", done, None),
            )  # fmt: skip
        from flows.cli.tables import show_validation

        deal.screen.result(outcome.model_dump(mode="json"), *show_validation(outcome))
        if not outcome.accepted:
            raise typer.Exit(FAILED)


@app.command()
def benchmark(
    data: Annotated[
        str, typer.Option("--data", "-d", help="Folder of tasks, or hf://datasets/OWNER/NAME.", show_default=False)
    ],
    suite: Annotated[str | None, typer.Option("--suite", help="3, 4, 8 or 15 tasks.", show_default=False)] = None,
    order: Annotated[
        list[str] | None, typer.Option("--order", help="Order of the suite's tasks.", show_default="1")
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="Tasks of your own, in order.")] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy", help="A strategy, or a bound: base, per_task, joint.", show_default="deal, seq_lora"
        ),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Seed of weights and row order.", show_default="0")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="Training rows per task.")] = 300,
    part: Annotated[str, typer.Option("--part", help="Test rows: dev (to choose settings on) or reported.")] = (
        "reported"
    ),
    max_test_rows: Annotated[
        int | None, typer.Option("--max-test-rows", help="Only the first so many test rows.", show_default="all")
    ] = None,
    scored: Annotated[
        str, typer.Option("--scored", help="Entries of the accuracy matrix: all, ends (diagonal and end) or last.")
    ] = "all",
    adapter: Annotated[
        str,
        typer.Option("--adapter", help="Changes to the adapter's shape, as JSON: rank, alpha, target_modules."),
    ] = "{}",
    train: Annotated[str, typer.Option("--train", help="Changes to the training settings, as JSON.")] = "{}",
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Changes to the methods' settings, as JSON; a cell for each.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model.", show_default="smollm2-135m-instruct")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the cells.", show_default="HOME/benchmark")
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare strategies on a suite of tasks; stored cells are kept, several commands share the work."""
    with session(home, as_json, debug) as deal:

        def start() -> Any:
            from flows.benchmark import benchmark as benchmark_flow
            from flows.benchmark import spec_from_options as benchmark_spec

            return benchmark_flow(
                benchmark_spec(
                    data=data, suite=suite, orders=order, tasks=task, strategies=strategy, seeds=seed, rows=rows,
                    part=part, max_test_rows=max_test_rows, scored=scored, base_model=base, out=out,
                    adapter=adapter, train=train, methods=method or [],
                )
            )  # fmt: skip

        outcome = deal.run(start)
        from flows.cli.tables import show_benchmark

        deal.screen.result(outcome.model_dump(mode="json"), *show_benchmark(outcome))
        if outcome.num_failed:
            raise typer.Exit(FAILED)


@model_app.command("fetch")
def fetch(
    source: Annotated[str, typer.Argument(help="Built-in name, Hub id, local folder or GGUF file.")] = (
        "smollm2-135m-instruct"
    ),
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring a base model to this machine, checked and converted, so that runs need no network."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("fetch"):
            from deal_core.base_model.sources import resolve_base
            from infra.settings import HomeSettings

            folder = resolve_base(
                source,
                HomeSettings().cache_dir,
                lambda doing, done, total: deal.screen.advanced("fetch", done, total, doing),
            )
        deal.screen.result({"source": source, "folder": str(folder)}, escape(f"{source} is in {folder}"))


@app.command()
def ui(
    open_: Annotated[bool, typer.Option("--open", help="Start MLflow's own server here and open it.")] = False,
    port: Annotated[int, typer.Option("--port", help="Port on the loopback address.")] = 5000,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say where MLflow shows the runs, or open it."""
    with session(home, as_json, debug) as deal:
        _show_ui(deal, open_, port)


app.add_typer(plan_app)
app.add_typer(report_app)
app.add_typer(labels_app)
app.add_typer(promotion_app)
app.add_typer(keeping_app)
app.add_typer(serve_app)
app.add_typer(vllm_app, name="vllm")
app.add_typer(server_app)  # last, so that help lists them after the commands that need no server


def main() -> None:
    """Run the command; the entry point of the installed `deal`."""
    app()


def _show_ui(deal: Session, open_: bool, port: int) -> None:
    from flows.server.ui import open_ui, ui_address

    address = ui_address(port)
    safe = address.shown()
    shown = [f"MLflow keeps the runs in {safe.tracking_uri}"]
    if safe.command:
        shown += ["Show them with:", f"  {safe.line()}", f"and open {safe.url}"]
    deal.screen.result(safe.model_dump(mode="json"), *map(escape, shown))
    if open_:
        raise typer.Exit(open_ui(address))
