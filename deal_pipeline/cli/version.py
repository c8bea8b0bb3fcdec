"""Commands about a lineage's versions: list, show, evaluate, export, and the decisions which of them serves."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_core.evaluation.interval import score_text
from deal_core.safe_text import brief
from deal_pipeline.cli.console import heading, matrix_table, new_table, percent, points, show_adaptation, show_held
from deal_pipeline.cli.session import CommandResult, Lineage, Reason, Session, command, reason_option

if TYPE_CHECKING:
    from deal_core.evaluation.accuracy_matrix import MatrixJson
    from flows.adapt_result import AdaptResult
    from flows.champions import EvaluateResult
    from infra.promotions import Decision, LeftBehind, Move
    from tasks.lineage.history import HistoryEntry
    from tasks.lineage.reports import WrittenReport
    from tasks.serving.export import Exported
    from tasks.serving.publish import Published

version_app = typer.Typer(help="List, show, promote, roll back, reject or export versions.", no_args_is_help=True)
Number = Annotated[str, Argument(help="Number of the version.")]


@dataclass(frozen=True, kw_only=True)
class ChampionAt:
    """The champion at a time."""

    at: str
    """The time, as ISO 8601 with its zone."""
    champion: str | None
    """Number of the version; None: no version was champion."""


@dataclass(frozen=True, kw_only=True)
class ShownVersion:
    """A version, and its page."""

    version: HistoryEntry
    page: WrittenReport | None
    """The page that --report has written; None: the option was not given."""


@command(version_app, "reading", "deal version list", "deal version list --at 2026-11-01T09:30+01:00", name="list")
def list_versions(
    deal: Session,
    lineage: Lineage = "",
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
    list[HistoryEntry]
    | Annotated[tuple[Move, ...], "with --moves"]
    | Annotated[ChampionAt, "with --at"]
    | Annotated[MatrixJson, "with --matrix"]
]:
    """List a lineage's versions: task, scores, the gate's decision, aliases. With --at: the champion at that time."""
    from infra.lineage_state import read_state
    from infra.promotions import PromotionLog
    from tasks.arrivals import held_arrivals
    from tasks.lineage.history import NoVersionError, find_version, read_history
    from tasks.lineage.record import read_record

    if matrix:
        scores = read_record(deal.store, find_version(deal.store, lineage, None)).matrix
        return CommandResult(scores.to_json(), [heading(f"Scores of {lineage}, %"), matrix_table(scores.to_json())])
    if at is not None:
        when, zone = _time(at)
        champion = PromotionLog(deal.store).champion_at(lineage, when)
        text = f"version {champion} was champion" if champion else "no version was champion"
        then = ChampionAt(at=when.isoformat(), champion=champion)
        return CommandResult(then, [f"At {then.at}{zone}, {text}."])
    if moves:
        log = PromotionLog(deal.store).moves(lineage)
        return CommandResult(log, [heading(f"Moves of {lineage}"), _moves(log)])
    held, limit = held_arrivals(read_state(deal.store, lineage)), 0 if deal.screen.as_json else newest
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


_APPROVAL = {None: "", "awaiting": ", awaits approval", "given": ", approved", "refused": ", [red]refused[/]"}


def _verdict(entry: HistoryEntry) -> str:
    """What the gate and a person decided; yellow if the gate could not have seen a drop."""
    colour = "red" if not entry.accepted else "yellow" if entry.unsure else "green"
    return f"[{colour}]{'accepted' if entry.accepted else 'rejected'}[/]" + _APPROVAL[entry.approval]


def show_history(lineage: str, entries: Sequence[HistoryEntry]) -> Sequence[RenderableType]:
    """The versions of a lineage."""
    is_tested = any(entry.arrival is not None for entry in entries)
    has_debts = any(lost > 0 for entry in entries for lost in entry.debts.values())
    numbers = ["version", "parent", "accuracy", "forgetting"]
    numbers += [*(["debt"] if has_debts else []), *(["on arrival"] if is_tested else [])]
    columns = (*numbers, "task", "strategy", "gate", "alias", "when")
    table = new_table(*columns, right=numbers, spare=("debt", "strategy", "when"))
    for entry in entries:
        gate = _verdict(entry)
        if "rollout" in entry.aliases:
            gate += ", in rollout"
        if entry.branch is not None:
            gate += f", branch {entry.branch}"
        if entry.rolled_back is not None:
            gate += ", [yellow]rolled back[/]"
        table.add_row(
            entry.version,
            entry.parent_version or "base",
            percent(entry.average_accuracy),
            percent(entry.forgetting),
            *([points(max(entry.debts.values(), default=None))] if has_debts else []),
            *([entry.arrival.figure.replace(" %", "") if entry.arrival else "–"] if is_tested else []),
            entry.lesson,
            entry.strategy,
            gate,
            " ".join(entry.aliases),
            f"{entry.created.astimezone():%m-%d %H:%M}",
        )
    reasons = [
        f"Version {entry.version}: {escape(reason)}"
        for entry in entries
        for reason in (*entry.reasons, *entry.unsure, *([entry.rolled_back.describe()] if entry.rolled_back else []))
    ]
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


@command(version_app, "reading", "deal version show 3", "deal version show 3 --report")
def show(
    deal: Session,
    version: Number,
    lineage: Lineage = "",
    report: Annotated[
        bool, Option("--report", help="Also write its page: accuracy, forgetting, data, timings.")
    ] = False,
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="With --report: the HTML file.", show_default="HOME/reports/LINEAGE-VERSION.html"),
    ] = None,
) -> CommandResult[ShownVersion]:
    """Show what a version learned and what the gate decided."""
    from tasks.lineage.history import no_version, read_history
    from tasks.lineage.reports import save_report

    if out is not None and not report:
        raise ConfigError("--out is the file of the page; give --report too.")
    entry = next((entry for entry in read_history(lineage) if entry.version == version), None)
    if entry is None:
        raise no_version(lineage, version)
    if not report:
        return CommandResult(ShownVersion(version=entry, page=None), _show_version(lineage, entry))
    page = save_report(lineage, version, out or deal.home / "reports" / f"{lineage}-{version}.html")
    shown = [*_show_version(lineage, entry), escape(f"Page: {page.file}")]
    return CommandResult(ShownVersion(version=entry, page=page), shown)


def _show_version(lineage: str, entry: HistoryEntry) -> Sequence[RenderableType]:
    table = new_table("what", "value")
    for name, value in {
        "task": escape(entry.lesson),
        "parent": f"version {entry.parent_version}" if entry.parent_version else "the base model",
        "gate": _verdict(entry),
        **({"rollback": f"[yellow]{escape(entry.rolled_back.describe())}[/]"} if entry.rolled_back else {}),
        "aliases": " ".join(entry.aliases) or "–",
        "average accuracy, %": percent(entry.average_accuracy),
        "forgetting, points": percent(entry.forgetting),
        **{f"{name}, %": percent(score) for name, score in entry.general.items()},
        "KL to the base model, nats a token": "–" if entry.base_divergence is None else f"{entry.base_divergence:.3f}",
        "version before, on the arrival": entry.arrival.figure if entry.arrival else "–",
        "lost since it was learned, points": escape(
            ", ".join(f"{task} {lost:.1f}" for task, lost in entry.debts.items()) or "–"
        ),
        "strategy": escape(entry.strategy),
        "dataset": entry.dataset_sha256[:12],
        "learned": f"{entry.created.astimezone():%Y-%m-%d %H:%M}",
    }.items():
        table.add_row(name, value)
    reasons = [f"  • {escape(reason)}" for reason in (*entry.reasons, *entry.unsure)]
    return [heading(f"Version {entry.version} of {lineage}"), table, *reasons]


@command(version_app, "starting", "deal version evaluate", "deal version evaluate 3")
def evaluate(
    deal: Session,
    version: Annotated[str | None, Argument(help="Number of the version.", show_default="the champion")] = None,
    lineage: Lineage = "",
) -> CommandResult[EvaluateResult]:
    """Score a version again on the frozen test rows of every task that it knows."""

    def start() -> Coroutine[Any, Any, EvaluateResult]:
        from flows.champions import evaluate as evaluate_flow

        return evaluate_flow(lineage, version)

    scores = deal.run(start, trains=True)
    numbers = ["now", "at its run", "test rows"]
    table = new_table("task", *numbers, right=numbers)
    for task, accuracy in scores.accuracies.items():
        num_rows = scores.num_rows[task]
        table.add_row(task, score_text(accuracy, num_rows), percent(scores.recorded.get(task)), str(num_rows))
    unjudged = [f"[yellow]{escape(why)}[/]" for why in scores.unjudged.values()]
    title = heading(f"Accuracy of {scores.lineage}, version {scores.version}, %")
    return CommandResult(scores, [title, table, *unjudged])


@command(version_app, "promoting", "deal version promote 4", 'deal version promote 4 --reason "checked by the bank"')
def promote(
    deal: Session, version: Number, lineage: Lineage = "", reason: Reason = "approved"
) -> CommandResult[Decision]:
    """Make a version champion. Its parent must be the present champion."""
    from tasks.lineage.promotion import promote_to

    return decided(promote_to(lineage, version, who=deal.account, why=reason))


@command(version_app, "rolling back", "deal version rollback", 'deal version rollback 2 --reason "wrong labels in May"')
def rollback(
    deal: Session,
    version: Annotated[
        str | None, Argument(help="Version to go back to.", show_default="the champion's parent")
    ] = None,
    lineage: Lineage = "",
    reason: Reason = "rolled back by hand",
) -> CommandResult[Decision]:
    """Make an earlier version the champion again, at once. The arrivals that it has not learned are listed."""
    from tasks.lineage.promotion import roll_back

    return decided(roll_back(lineage, version, who=deal.account, why=reason))


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
    lineage: Lineage = "",
) -> CommandResult[Decision]:
    """Reject a version. It can never become champion."""
    from tasks.lineage.promotion import reject_version

    return decided(reject_version(lineage, version, who=deal.account, why=reason))


def decided(done: Decision) -> CommandResult[Decision]:
    """A decision of a person. It is logged and printed before Prefect, the webhook and MLflow are told."""
    from flows.promote import tell_once

    return CommandResult(done, show_decision(done), afterwards=partial(tell_once, done))


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
        shown += ["It has not learned:", _learned(done.left_behind), _remedy(done.lineage)]
    return shown


@command(version_app, None, "deal version requeue", "deal version requeue 3", "deal version requeue --all")
def requeue(
    deal: Session,
    versions: Annotated[list[str] | None, Argument(help="Versions to learn again.", show_default=False)] = None,
    all_: Annotated[
        bool,
        Option("--all", help="Learn all arrivals that were left behind, and let those go on whose run was cancelled."),
    ] = False,
    lineage: Lineage = "",
) -> CommandResult[list[LeftBehind] | Annotated[list[AdaptResult], "with versions or --all"]]:
    """List the arrivals that a rollback left behind, or learn them again."""
    from flows.requeue import requeue as requeue_flow
    from infra.lineage_state import read_state
    from tasks.arrivals import held_arrivals
    from tasks.lineage.promotion import find_left_behind

    if not (all_ or versions):
        left_behind = find_left_behind(lineage)
        held = show_held(lineage, held_arrivals(read_state(deal.store, lineage)))
        return CommandResult(list(left_behind), [*_show_left_behind(lineage, left_behind), *held])
    if all_ and versions:
        raise ConfigError("Give either versions or --all, not both.")
    runs = deal.run(lambda: requeue_flow(lineage, versions or []))
    shown = [line for run in runs for line in show_adaptation(run)] or _show_left_behind(lineage, ())
    return CommandResult(runs, shown, rejected=any(run.rejected for run in runs))


def _show_left_behind(lineage: str, left_behind: Sequence[LeftBehind]) -> Sequence[RenderableType]:
    if not left_behind:
        return [f"The champion of {escape(lineage)} has learned every accepted arrival."]
    return [heading(f"Left behind in {lineage}"), _learned(left_behind), _remedy(lineage)]


def _learned(left_behind: Sequence[LeftBehind]) -> RenderableType:
    table = new_table("version", "task", "dataset", right=["version"])
    for arrival in left_behind:
        table.add_row(arrival.version, escape(arrival.task), arrival.dataset_sha256[:12])
    return table


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
    lineage: Lineage = "",
    base_model: Annotated[
        str | None,
        Option(
            help="With --format vllm: the model that `vllm serve` was started with, word for word.",
            show_default="the base model's Hub id or folder",
        ),
    ] = None,
) -> CommandResult[Exported | Annotated[Published, "with --format vllm"]]:
    """Export a version for other programs. All but vllm are compared with the served version."""
    from tasks.serving.export import Target, export_version

    formats = (*get_args(Target), "vllm")
    if format_ not in formats:
        raise ConfigError(f"--format is {format_!r}; give one of {', '.join(formats)}.")
    if format_ == "vllm":
        from infra.settings import EngineSettings
        from tasks.serving.publish import publish

        published = publish(lineage, Path(out), EngineSettings(), version=version, model=base_model)
        state = "is in" if published.is_new else "was already in"
        shown = [
            f"[bold green]{escape(published.model)}[/] {state} {escape(published.folder)}: version "
            f"{escape(published.version)} of {escape(published.lineage)}",
            f"  requests name it as their model; the servers run: vllm serve {escape(published.base_model)}",
        ]
        return CommandResult(published, shown)
    if base_model is not None:
        raise ConfigError("--base-model goes with --format vllm; leave it out.")
    exported = export_version(lineage, version, cast("Target", format_), out)
    shown = [
        f"[bold green]Version {escape(exported.version)} of {escape(exported.lineage)}[/] is in "
        f"{escape(exported.address)}",
        f"  logits differ from the served version by {exported.max_difference:.2g} at most, on {exported.num_prompts} "
        f"prompts of its tasks, in {exported.precision} ({exported.tolerance:g} is allowed)",
    ]
    return CommandResult(exported, shown)
