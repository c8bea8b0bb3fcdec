"""Commands that let a lineage learn and answer: demo, adapt, watch, evaluate, history, predict."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_core.safe_text import brief
from flows.cli.console import (
    heading,
    home_option,
    matrix_table,
    named_scores,
    new_table,
    percent,
    show_adaptation,
    show_held,
)
from flows.cli.session import Column, CommandResult, Lineage, Session, command, main_app

if TYPE_CHECKING:
    from flows.adapt import AdaptResult
    from flows.champions import EvaluateResult
    from flows.cli.demo import DemoResult
    from flows.watch import WatchResult
    from infra.promotions import Move
    from tasks.lineage.history import HistoryEntry
    from tasks.predict import FileAnswers


Base = Annotated[
    str | None,
    Option(
        "--base",
        help="Hub id, local folder or GGUF file.",
        show_default="the lineage's own, else smollm2-135m-instruct",
    ),
]
Strategy = Annotated[
    str | None,
    Option(
        "--strategy",
        help="deal, seq_lora, replay, or one of an installed package.",
        show_default="the lineage's own, else deal",
    ),
]
Memory = Annotated[
    str | None,
    Option(
        "--memory",
        show_default="the lineage's own, else tests",
        help="What old tasks are asked about. none: new texts. tests: test rows of theirs. "
        "rows: a kept tenth of theirs.",
    ),
]
SpecLineage = Annotated[
    str | None, Option("--lineage", "-l", help="Name of the lineage.", show_default="the spec's, else default")
]
Version = Annotated[str | None, Option("--version", help="Adapter version.", show_default="the champion")]


@command(main_app, "starting")
def demo(
    deal: Session,
    compare: Annotated[
        bool, Option("--compare", help="Also let plain continued LoRA learn the same arrivals, without a gate.")
    ] = False,
    base: Annotated[str | None, Option(help="Another base model.", show_default="smollm2-135m-instruct")] = None,
    picture: Annotated[
        Path | None, Option(help="File for the picture of the result (PNG).", show_default="HOME/demo.png")
    ] = None,
) -> CommandResult:
    """Let three example domains arrive one after another and show what the adapter keeps of each."""

    def start() -> Coroutine[Any, Any, DemoResult]:
        from flows.cli.demo import run_demo

        return run_demo(picture=picture or deal.home / "demo.png", compare=compare, base_model=base)

    outcome = deal.run(start, trains=True)
    return CommandResult(outcome, show_demo(outcome, deal.home), failed=outcome.failed, rejected=outcome.rejected)


def show_demo(result: DemoResult, home: Path) -> Sequence[RenderableType]:
    """The result of the demo, lineages side by side."""
    shown: list[RenderableType] = []
    numbers = ["AA", "forgetting", "BWT", "FWT", "champion"]
    comparison = new_table("lineage", "strategy", *numbers, right=numbers)
    for outcome in result.outcomes:
        if outcome.champion is None:
            shown.append(f"[red]No version of {outcome.lineage} has passed the gate.[/]")
        if outcome.matrix is None or outcome.scores is None:
            continue
        shown += [heading(f"Accuracy of {outcome.lineage} ({outcome.strategy}), %"), matrix_table(outcome.matrix)]
        champion = f"version {outcome.champion}" if outcome.champion else "none"
        comparison.add_row(outcome.lineage, outcome.strategy, *named_scores(outcome.scores).values(), champion)
    if comparison.row_count:
        shown += [heading("In the end"), comparison]
    for outcome in result.outcomes:
        for run in outcome.runs:
            if run.rejected:
                shown += [f"[red]{escape(run.message)}[/]", *(f"  • {escape(reason)}" for reason in run.reasons)]
        shown += [f"[red]{escape(message)}[/]" for message in outcome.refused]
    if result.picture is not None:
        shown.append(f"Picture:      {escape(str(result.picture))}")
    option, first = home_option(home), result.outcomes[0].lineage
    return [
        *shown,
        escape(
            f"Look closer:  deal history --lineage {first}{option}\n"
            f"              deal ui{option}\n"
            f'              deal predict --lineage {first} --task parcels "My parcel is stuck at customs"{option}'
        ),
    ]


@command(main_app, "starting")
def adapt(
    deal: Session,
    spec: Annotated[Path | None, Argument(help="Spec file (YAML).", show_default=False)] = None,
    task: Annotated[str | None, Option("--task", "-t", help="Task the file belongs to.")] = None,
    data: Annotated[
        str | None, Option("--data", "-d", help="File, folder, pattern or address: CSV, JSON lines or Parquet.")
    ] = None,
    test_data: Annotated[str | None, Option(help="File or folder of test rows.")] = None,
    lineage: SpecLineage = None,
    base: Base = None,
    strategy: Strategy = None,
    memory: Memory = None,
    again: Annotated[
        bool, Option("--again", help="Train even if this file was already learned. Repeating the command trains again.")
    ] = False,
) -> CommandResult:
    """Adapt the lineage's champion to one arrival, given by a spec or by --task and --data."""
    from tasks.lineage.settings import spec_from_options

    adapt_spec = spec_from_options(
        deal.store,
        spec,
        task=task,
        data=data,
        test_data=test_data,
        lineage=lineage,
        base_model=base,
        strategy=strategy,
        memory=memory,
    )

    def start() -> Coroutine[Any, Any, AdaptResult]:
        from flows.adapt import adapt as adapt_flow

        return adapt_flow(adapt_spec, again=again)

    outcome = deal.run(start, trains=True)
    return CommandResult(outcome, show_adaptation(outcome), rejected=outcome.rejected)


@command(main_app, "starting")
def watch(
    deal: Session,
    once: Annotated[bool, Option("--once", help="Handle the files that are there, then end.")] = False,
    spec: Annotated[Path | None, Option(help="Lineage settings (a spec without its task).", show_default=False)] = None,
    task: Annotated[
        list[str] | None,
        Option("--task", "-t", help="Only this task's files.", show_default="the lineage's tasks, else all"),
    ] = None,
    lineage: SpecLineage = None,
    base: Base = None,
    strategy: Strategy = None,
    memory: Memory = None,
    poll: Annotated[float, Option(min=0.1, help="Seconds between two checks of the inbox.")] = 2.0,
) -> CommandResult:
    """Adapt to files and folders as they land in the inbox (STORE/inbox/TASK/NAME), each once."""
    from tasks.lineage.settings import watched_from_options

    watched = watched_from_options(
        deal.store, spec, tasks=task or None, lineage=lineage, base_model=base, strategy=strategy, memory=memory
    )

    def start() -> Coroutine[Any, Any, WatchResult]:
        from flows.watch import watch as watch_flow

        return watch_flow(watched, tasks=watched.tasks, once=once, poll_seconds=poll)

    outcome = deal.run(start)
    return CommandResult(
        outcome, show_watch(outcome), failed=outcome.num_refused > 0, rejected=outcome.num_rejected > 0
    )


def show_watch(result: WatchResult) -> Sequence[RenderableType]:
    """The files that a watch has handled."""
    if not result.files:
        return ["Nothing is due. What waits: deal status"]
    table = new_table("file", "outcome", "version", "what happened", right=["version"])
    for seen in result.files:
        table.add_row(escape(seen.key), seen.outcome, seen.version or "–", escape(seen.message))
    return [heading(f"Handled for {result.lineage}"), table]


@command(main_app, "starting")
def evaluate(deal: Session, lineage: Lineage = "default", version: Version = None) -> CommandResult:
    """Score a version again on the frozen test rows of every task that it knows."""

    def start() -> Coroutine[Any, Any, EvaluateResult]:
        from flows.champions import evaluate as evaluate_flow

        return evaluate_flow(lineage, version)

    found = deal.run(start, trains=True)
    numbers = ["now", "at its run", "test rows"]
    table = new_table("task", *numbers, right=numbers)
    for task, value in found.accuracies.items():
        table.add_row(task, percent(value), percent(found.recorded.get(task)), str(found.num_rows[task]))
    unjudged = [f"[yellow]{escape(why)}[/]" for why in found.unjudged.values()]
    title = heading(f"Accuracy of {found.lineage}, version {found.version}, %")
    return CommandResult(found, [title, table, *unjudged])


@command(main_app, "reading")
def history(
    deal: Session,
    lineage: Lineage = "default",
    at: Annotated[
        str | None,
        Option(
            metavar="TIME",
            help="Show which version was champion at this time: 2026-11-01T09:30+01:00, 2026-11-01T08:30Z, or a date. "
            "A time without a zone is local.",
            show_default=False,
        ),
    ] = None,
    moves: Annotated[bool, Option("--moves", help="Show the promotion log instead.")] = False,
    matrix: Annotated[
        bool, Option("--matrix", help="Show instead how well the versions up to the champion answer each task.")
    ] = False,
    newest: Annotated[
        int, Option("--newest", "-n", help="Show the N newest versions (0: all; --json always shows all).", min=0)
    ] = 30,
) -> CommandResult:
    """List a lineage's versions: task, scores, the gate's decision, aliases. With --at: the champion at that time."""
    from infra.promotions import PromotionLog
    from tasks.inbox import find_held
    from tasks.lineage.history import NoVersionError, find_version, read_history
    from tasks.lineage.record import read_record

    if matrix:
        found = read_record(deal.store, find_version(deal.store, lineage, None).adapter_uri).matrix
        shown = [matrix_table(found.to_json())] if found else ["No task of the champion has test rows."]
        return CommandResult(found.to_json() if found else None, [heading(f"Scores of {lineage}, %"), *shown])
    if at is not None:
        when, zone = _time(at)
        champion = PromotionLog(deal.store).champion_at(lineage, when)
        text = f"version {champion} was champion" if champion else "no version was champion"
        return CommandResult({"at": when.isoformat(), "champion": champion}, [f"At {when.isoformat()}{zone}, {text}."])
    if moves:
        log = PromotionLog(deal.store).moves(lineage)
        return CommandResult(log, [heading(f"Moves of {lineage}"), _moves(log)])
    held, limit = find_held(deal.store, lineage), 0 if deal.screen.as_json else newest
    try:
        entries = read_history(lineage, limit + 1 if limit else None)
    except NoVersionError:
        if not held:
            raise
        entries = []  # its first arrival is held
    more = ["[dim]There are earlier versions; --newest 0 shows all.[/]"] if limit and len(entries) > limit else []
    versions = show_history(lineage, entries[-limit:]) if entries else ()
    return CommandResult(entries, [*more, *versions, *show_held(lineage, held)])


def _time(text: str) -> tuple[datetime, str]:
    """Read a time. Without a zone it is local, and the second text says so.

    Raises:
        ConfigError: The text is no time, or the local zone has no such time.
    """
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"--at is {brief(text)}; give a time such as 2026-11-01T09:30+01:00, or a date such as 2026-11-01."
        ) from None
    if when.tzinfo is not None:
        return when, ""
    try:
        local = when.astimezone()
    except (ValueError, OverflowError, OSError):  # before year 1, after year 9999, or beyond the system's clock
        raise ConfigError(
            f"--at is {text}, and in the local time zone that time cannot be computed; give its zone, as in "
            f"{when.isoformat()}Z."
        ) from None
    return local, f" (local time, {local.tzname()})"


_APPROVAL = {None: "", "awaiting": ", awaits approval", "given": ", approved", "refused": ", [red]refused[/]"}


def show_history(lineage: str, entries: Sequence[HistoryEntry]) -> Sequence[RenderableType]:
    """The versions of a lineage."""
    is_tested = any(entry.arrival_accuracy is not None for entry in entries)
    numbers = ["version", "parent", "AA", "forgetting", *(["on arrival"] if is_tested else [])]
    table = new_table(*numbers, "task", "strategy", "gate", "alias", "when", right=numbers)
    for entry in entries:
        gate = ("[green]accepted[/]" if entry.accepted else "[red]rejected[/]") + _APPROVAL[entry.approval]
        if "rollout" in entry.aliases:
            gate += ", in rollout"
        table.add_row(
            entry.version,
            entry.parent_version or "base",
            percent(entry.average_accuracy),
            percent(entry.forgetting),
            *([percent(entry.arrival_accuracy)] if is_tested else []),
            entry.task,
            entry.strategy,
            gate,
            " ".join(entry.aliases),
            f"{entry.created.astimezone():%m-%d %H:%M}",
        )
    reasons = [f"Version {entry.version}: {escape(reason)}" for entry in entries for reason in entry.reasons]
    return [heading(f"Lineage {lineage}"), table, *reasons]


def _moves(moves: Sequence[Move]) -> RenderableType:
    table = new_table("when", "what", "version", "champion", "who", "why", right=["version", "champion"])
    for move in moves:
        table.add_row(
            f"{move.when.astimezone():%Y-%m-%d %H:%M:%S}",
            move.action,
            move.version,
            move.champion or "–",
            escape(move.who),
            escape(move.why),
        )
    return table


@command(main_app)
def predict(
    deal: Session,
    text: Annotated[str | None, Argument(help="Text to answer; - reads standard input.", show_default=False)] = None,
    data: Annotated[
        Path | None, Option("--data", "-d", help="File whose rows are answered: CSV, JSON lines or Parquet.")
    ] = None,
    task: Annotated[str | None, Option("--task", "-t", help="Task to ask.", show_default="the newest one")] = None,
    lineage: Lineage = "default",
    version: Version = None,
    out: Annotated[
        Path | None, Option("--out", "-o", help="With --data: .jsonl or .parquet.", show_default="next to the file")
    ] = None,
    column: Column = None,
) -> CommandResult:
    """Answer a text, or every row of a file, with the lineage's champion."""
    if data is not None and text is not None:
        raise ConfigError("Give either a text or --data FILE, not both.")
    if data is None and (text is None or out is not None or column is not None):
        raise ConfigError("Give a text to answer, or a file with --data; --out and --column go with a file.")
    if text == "-":
        text = typer.get_text_stream("stdin").read().strip()
    with deal.screen.working("reading" if text is None else "predicting"):
        from flows.server.embedded import calm_libraries
        from tasks.predict import predict as predict_answer
        from tasks.predict import predict_file

        calm_libraries()
        if text is not None:
            answer = predict_answer(text, lineage=lineage, task=task, version=version)
            return CommandResult(answer, [escape(answer.answer)])
        assert data is not None
        outcome = predict_file(
            data,
            lineage=lineage,
            task=task,
            version=version,
            out=out,
            column=column,
            on_progress=lambda done, total: deal.screen.advanced("answering", done, total),
        )
    return CommandResult(outcome, [*map(escape, _about_file(outcome))])


def _about_file(result: FileAnswers) -> list[str]:
    shown = [
        f"{result.out}: {result.num_rows} rows answered by version {result.version} of {result.lineage} "
        f"as {result.task}, {result.seconds:.1f} s"
    ]
    if result.num_bad:
        shown.append(f"{result.num_bad} rows have no answer; the column {result.columns['problem']} says why.")
    renamed = [name for name, column in result.columns.items() if name != column]
    if renamed:
        shown.append(f"The file has columns of these names already, so ours are called deal_…: {', '.join(renamed)}")
    return shown
