"""Commands about a lineage's versions: list, show, evaluate, export, and the decisions which of them serves."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_core.evaluation.interval import CellScore
from deal_core.safe_text import brief
from deal_pipeline.cli.console import show_adaptation, show_held
from deal_pipeline.cli.render import render, render_facts, render_matrix
from deal_pipeline.cli.session import CommandResult, LineageOption, Reason, Session, command, reason_option

if TYPE_CHECKING:
    from deal_core.evaluation.accuracy_matrix import MatrixJson
    from deal_pipeline.lineage import Lineage
    from deal_pipeline.results import ChampionAt, ShownVersion
    from flows.adapt_result import AdaptResult
    from flows.champions import EvaluateResult
    from infra.promotions import Move
    from infra.versions import Decision, Version
    from tasks.serving.export import Exported
    from tasks.serving.publish import Published

version_app = typer.Typer(help="List, show, promote, roll back, reject or export versions.", no_args_is_help=True)
Number = Annotated[str, Argument(help="Number of the version.")]


@command(version_app, "reading", "deal version list", "deal version list --at 2026-11-01T09:30+01:00", name="list")
def list_versions(
    deal: Session,
    lineage: LineageOption = "",
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
) -> CommandResult[
    tuple[Version, ...]
    | Annotated[tuple[Move, ...], "with --moves"]
    | Annotated[ChampionAt, "with --at"]
    | Annotated[MatrixJson, "with --matrix"]
]:
    """List a lineage's versions: task, scores, the gate's decision, aliases. With --at: the champion at that time."""
    versions = deal.lineage(lineage)
    if matrix:
        scores = versions.matrix().to_json()
        return CommandResult(scores, render_matrix(scores, f"Scores of {lineage}, %"))
    if at is not None:
        when, zone = _read_time(at)
        then = versions.champion_at(when)
        text = f"version {then.champion} was champion" if then.champion else "no version was champion"
        return CommandResult(then, [f"At {then.at}{zone}, {text}."])
    if moves:
        log = versions.moves()
        return CommandResult(
            log, render(log, f"Moves of {lineage}") or [f"The champion of {escape(lineage)} was never moved."]
        )
    entries = versions.history()
    is_cut = 0 < newest < len(entries)
    more = ["[dim]There are earlier versions; --newest 0 shows all.[/]"] if is_cut else []
    shown = [*more, *show_history(lineage, entries[-newest:]), *show_held(lineage, versions.held())]
    return CommandResult(entries, shown)


def _read_time(text: str) -> tuple[datetime, str]:
    """Read a time. Without a zone it is local, and the second text says so."""
    try:
        when = datetime.fromisoformat(text)
        if when.tzinfo is not None:
            return when, ""
        local = when.astimezone()
    except (ValueError, OverflowError, OSError):  # no time, or one before year 1 or beyond the system's clock
        raise ConfigError(
            f"--at is {brief(text)}; give a time such as 2026-11-01T09:30+01:00, or a date such as 2026-11-01."
        ) from None
    return local, f" (local time, {local.tzname()})"


def show_history(lineage: str, versions: Sequence[Version]) -> Sequence[RenderableType]:
    """The versions of a lineage, and why they were rejected, taken back or are unsure."""
    reasons = [f"Version {version.version}: {escape(reason)}" for version in versions for reason in _reasons(version)]
    return [*render(versions, f"Lineage {lineage}"), *reasons]


def _reasons(version: Version) -> Sequence[str]:
    rollback = version.since.rolled_back
    return (*version.reasons, *version.unsure, *([rollback.describe()] if rollback else []))


@command(version_app, "reading", "deal version show 3", "deal version show 3 --report")
def show(
    deal: Session,
    version: Number,
    lineage: LineageOption = "",
    report: Annotated[
        bool, Option("--report", help="Also write its page: accuracy, forgetting, data, timings.")
    ] = False,
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="With --report: the HTML file.", show_default="HOME/reports/LINEAGE-VERSION.html"),
    ] = None,
) -> CommandResult[ShownVersion]:
    """Show what a version learned and what the gate decided."""
    if out is not None and not report:
        raise ConfigError("--out is the file of the page; give --report too.")
    named = deal.lineage(lineage).show(version, report=report, out=out)
    shown = [
        *render_facts(named.version, title=f"Version {version} of {lineage}"),
        *(f"  • {escape(reason)}" for reason in _reasons(named.version)),
        *([escape(f"Page: {named.page}")] if named.page else []),
    ]
    return CommandResult(named, shown)


@command(version_app, "starting", "deal version evaluate", "deal version evaluate 3")
def evaluate(
    deal: Session,
    version: Annotated[str | None, Argument(help="Number of the version.", show_default="the champion")] = None,
    lineage: LineageOption = "",
) -> CommandResult[EvaluateResult]:
    """Score a version again on the frozen test rows of every task that it knows."""
    scores = deal.lineage(lineage).evaluate(version)
    table = [
        {
            "task": task,
            "now": CellScore(accuracy, scores.num_rows[task]),
            "at its run": CellScore(scores.recorded.get(task), None),
            "test rows": scores.num_rows[task],
        }
        for task, accuracy in scores.accuracies.items()
    ]
    unjudged = [f"[yellow]{escape(why)}[/]" for why in scores.unjudged.values()]
    title = f"Accuracy of {scores.lineage}, version {scores.version}, %"
    return CommandResult(scores, [*render(table, title), *unjudged])


@command(version_app, "promoting", "deal version promote 4", 'deal version promote 4 --reason "checked by the bank"')
def promote(
    deal: Session, version: Number, lineage: LineageOption = "", reason: Reason = "approved"
) -> CommandResult[Decision]:
    """Make a version champion. Its parent must be the present champion."""
    versions = deal.lineage(lineage)
    return decided(versions, versions.promote(version, why=reason, tells=False))


@command(version_app, "rolling back", "deal version rollback", 'deal version rollback 2 --reason "wrong labels in May"')
def rollback(
    deal: Session,
    version: Annotated[
        str | None, Argument(help="Version to go back to.", show_default="the champion's parent")
    ] = None,
    lineage: LineageOption = "",
    reason: Reason = "rolled back by hand",
) -> CommandResult[Decision]:
    """Make an earlier version the champion again, at once. The arrivals that it has not learned are listed."""
    versions = deal.lineage(lineage)
    return decided(versions, versions.rollback(version, why=reason, tells=False))


@command(
    version_app,
    "rejecting",
    'deal version reject 4 --reason "unsafe"',
    'deal version reject 4 -l bank --reason "unsafe"',
)
def reject(
    deal: Session,
    version: Number,
    reason: Annotated[str, reason_option("the promotion log", show_default=False)],
    lineage: LineageOption = "",
) -> CommandResult[Decision]:
    """Reject a version. It can never become champion."""
    versions = deal.lineage(lineage)
    return decided(versions, versions.reject(version, why=reason, tells=False))


def decided(lineage: Lineage, done: Decision) -> CommandResult[Decision]:
    """A decision of a person. It is logged and printed before Prefect, the webhook and MLflow are told."""
    return CommandResult(done, show_decision(done), afterwards=partial(lineage.tell, done))


def show_decision(done: Decision) -> Sequence[RenderableType]:
    """What was decided, and which arrivals the champion has not learned."""
    if done.action == "rejected":
        serves = f"version {done.champion} serves on" if done.champion else "no version serves"
        return [f"[bold]Version {done.version} of {escape(done.lineage)} is rejected; {serves}.[/]"]
    if done.action == "rollout":
        return [
            f"[bold]Version {done.version} of {escape(done.lineage)} is tried on live traffic; version "
            f"{done.champion} serves on.[/]"
        ]
    before = f"version {done.before}" if done.before else "none"
    shown: list[RenderableType] = [
        f"[bold green]Champion of {escape(done.lineage)}: version {done.champion}[/] (before: {before})"
    ]
    if done.left_behind:
        shown += ["It has not learned:", *render(done.left_behind), _remedy(done.lineage)]
    return shown


@command(version_app, None, "deal version requeue", "deal version requeue 3", "deal version requeue --all")
def requeue(
    deal: Session,
    versions: Annotated[list[str] | None, Argument(help="Versions to learn again.", show_default=False)] = None,
    all_: Annotated[
        bool,
        Option("--all", help="Learn all arrivals that were left behind, and let those go on whose run was cancelled."),
    ] = False,
    lineage: LineageOption = "",
) -> CommandResult[tuple[Version, ...] | Annotated[list[AdaptResult], "with versions or --all"]]:
    """List the arrivals that a rollback left behind, or learn them again."""
    lineage_versions = deal.lineage(lineage)
    if not (all_ or versions):
        left_behind = lineage_versions.left_behind()
        held = show_held(lineage, lineage_versions.held())
        return CommandResult(left_behind, [*_show_left_behind(lineage, left_behind), *held])
    if all_ and versions:
        raise ConfigError("Give either versions or --all, not both.")
    runs = lineage_versions.requeue(*versions or ())
    shown = [line for run in runs for line in show_adaptation(run)] or _show_left_behind(lineage, ())
    return CommandResult(runs, shown, rejected=any(run.rejected for run in runs))


def _show_left_behind(lineage: str, left_behind: Sequence[Version]) -> Sequence[RenderableType]:
    if not left_behind:
        return [f"The champion of {escape(lineage)} has learned every accepted arrival."]
    return [*render(left_behind, f"Left behind in {lineage}"), _remedy(lineage)]


def _remedy(lineage: str) -> str:
    return f"Learn it again with: deal version requeue --all --lineage {escape(lineage)}"


@command(
    version_app,
    "exporting",
    "deal version export 3 --format merged --out model",
    "deal version export 3 --format peft --out adapter",
    "deal version export 3 --format hub --out OWNER/NAME",
    "deal version export 3 --format vllm --out /mnt/adapters",
)
def export(
    deal: Session,
    version: Number,
    format_: Annotated[
        str,
        Option(
            "--format",
            help="merged: a transformers folder. peft: the PEFT folder, without rows. hub: the same, on the Hub. vllm: "
            "a folder that vLLM's filesystem resolver finds.",
        ),
    ],
    out: Annotated[
        str,
        Option(
            "--out", "-o", help="New folder; hub: OWNER/NAME of the repository; vllm: the servers' folder of adapters."
        ),
    ],
    lineage: LineageOption = "",
    base_model: Annotated[
        str | None,
        Option(
            help="With --format vllm: the model that `vllm serve` was started with, word for word.",
            show_default="the base model's Hub id or folder",
        ),
    ] = None,
) -> CommandResult[Exported | Annotated[Published, "with --format vllm"]]:
    """Export a version for other programs. All but vllm are compared with the served version."""
    from tasks.serving.export import Target

    formats = (*get_args(Target), "vllm")
    if format_ not in formats:
        raise ConfigError(f"--format is {format_!r}; give one of {', '.join(formats)}.")
    if format_ == "vllm":
        published = deal.lineage(lineage).publish(version, out, base_model=base_model)
        state = "is in" if published.is_new else "was already in"
        shown = [
            f"[bold green]{escape(published.model)}[/] {state} {escape(published.folder)}: version "
            f"{escape(published.version)} of {escape(published.lineage)}",
            f"  requests name it as their model; the servers run: vllm serve {escape(published.base_model)}",
        ]
        return CommandResult(published, shown)
    if base_model is not None:
        raise ConfigError("--base-model goes with --format vllm; leave it out.")
    exported = deal.lineage(lineage).export(version, to=cast("Target", format_), out=out)
    shown = [
        f"[bold green]Version {escape(exported.version)} of {escape(exported.lineage)}[/] is in "
        f"{escape(exported.address)}",
        f"  logits differ from the served version by {exported.max_difference:.2g} at most, on {exported.num_prompts} "
        f"prompts of its tasks, in {exported.precision} ({exported.tolerance:g} is allowed)",
    ]
    return CommandResult(exported, shown)
