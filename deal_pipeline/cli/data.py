"""Commands about stored data: list, release, delete and gc."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_pipeline.cli.branch import AcceptLost, SkipRejected, show_branch_plan, show_compared
from deal_pipeline.cli.render import heading, render, size_text
from deal_pipeline.cli.session import CommandResult, LineageOption, Session, command, reason_option

if TYPE_CHECKING:
    from deal_pipeline.results import ReleasedArrivals
    from flows.branch import BranchResult
    from flows.forget import ForgetResult
    from flows.gc import GcResult
    from flows.relearn import RelearnPlan
    from infra.deleted_inputs import UnknownRows
    from tasks.housekeeping.arrivals import ListedArrival
    from tasks.housekeeping.forgetting import AffectedVersion, ForgetPlan

data_app = typer.Typer(help="List what has landed, delete it, or free disk space.", no_args_is_help=True)


@command(data_app, "reading", "deal data list", "deal data list --json", name="list", works_without_home=True)
def list_data(deal: Session) -> CommandResult[list[ListedArrival]]:
    """List the arrivals: their rows, the versions that learned them, and those that are held."""
    arrivals = deal.service.arrivals()
    if not arrivals:
        return CommandResult(arrivals, ["No arrival has been learned or is held. What waits in the inbox: deal status"])
    return CommandResult(arrivals, render(arrivals, "Arrivals"))


@command(
    data_app, "reading", "deal data release inbox/bank/may.csv", "deal data release --all", works_without_home=True
)
def release(
    deal: Session,
    arrivals: Annotated[
        list[str] | None, Argument(help="Held arrivals, as inbox/TASK/FILE or a path.", show_default=False)
    ] = None,
    all_: Annotated[bool, Option("--all", help="Release every held arrival of the lineage.")] = False,
    lineage: LineageOption = "",
) -> CommandResult[ReleasedArrivals]:
    """Let arrivals go on that are held: their run was cancelled, or their labels disagree with the champion."""
    if all_ == bool(arrivals):
        raise ConfigError("Name the held arrivals (deal status lists them), or give --all.")
    released = deal.lineage(lineage).release(*arrivals or ())
    shown = [
        f"{name} goes on: a watch learns it at its next look."
        if name.startswith("inbox/")
        else f"{name} goes on: give the command that learns it again."
        for name in released.released
    ]
    return CommandResult(released, [*map(escape, shown or ["Nothing is held."])])


@command(data_app, "looking", "deal data gc --dry-run", "deal data gc --older-than 4w")
def gc(
    deal: Session,
    lineage: Annotated[str | None, Option("--lineage", "-l", help="Only this lineage.", show_default="all")] = None,
    older_than: Annotated[str, Option(metavar="AGE", help="Minimum age of what is removed: 12h, 30d, 4w.")] = "30d",
    dry_run: Annotated[bool, Option("--dry-run", "-n", help="Only list what would be removed.")] = False,
) -> CommandResult[GcResult]:
    """Remove what is no longer needed: checkpoints, old rejected adapters, stored training rows, old logs."""
    outcome = deal.service.collect(lineage, older_than=older_than, dry_run=dry_run)
    return CommandResult(outcome, _show_gc(outcome), failed=bool(outcome.problems))


def _show_gc(result: GcResult) -> Sequence[RenderableType]:
    left = [f"[yellow]{escape(name)} was at work and left alone.[/]" for name in result.busy]
    left += [f"[red]{escape(f'{name}: {problem}')}[/]" for name, problem in result.problems.items()]
    if not result.removals:
        return [*left, "Nothing to remove."]
    done = "would be removed" if result.dry_run else "removed"
    total = f"{len(result.removals)} {done}, {size_text(result.num_bytes)}"
    return [*left, *render(result.removals, done.capitalize()), f"[bold]{total}[/]"]


@command(
    data_app,
    None,
    "deal data delete july.csv --dry-run",
    "deal data delete inbox/bank/may.csv --yes",
    "deal data delete 3fa9c1 --relearn --lineage support",
)
def delete(
    deal: Session,
    arrival: Annotated[str, Argument(help="Name of its file, key inbox/TASK/FILE, or digest of the dataset.")],
    reason: Annotated[str, reason_option("the history. Quote no rows")] = "",
    dry_run: Annotated[bool, Option("--dry-run", "-n", help="Only list what would be removed.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    relearn: Annotated[
        bool, Option("--relearn", help="Also make every version that learned from it again, as if it had never landed.")
    ] = False,
    lineage: Annotated[
        str | None,
        Option(
            "--lineage",
            "-l",
            help="With --relearn: lineage whose versions are made again. Rows are deleted in all lineages.",
            show_default="DEAL_LINEAGE, else the only lineage",
        ),
    ] = None,
    skip_rejected: SkipRejected = False,
    stop_serving: Annotated[
        bool, Option("--stop-serving", help="With --relearn: let no version serve until the new ones do.")
    ] = False,
    accept_lost: AcceptLost = False,
) -> CommandResult[
    Annotated[ForgetPlan, "with --dry-run"]
    | Annotated[RelearnPlan, "with --relearn and --dry-run"]
    | Annotated[BranchResult, "with --relearn"]
    | ForgetResult
]:
    """Remove an arrival's rows from everything that is stored, and list every version that learned from it."""
    if relearn:
        return _relearn(
            deal,
            lineage,
            arrival,
            dry_run=dry_run,
            yes=yes,
            reason=reason,
            skip_rejected=skip_rejected,
            stops_serving=stop_serving,
            accept_lost=accept_lost,
        )
    if lineage or skip_rejected or stop_serving or accept_lost:
        raise ConfigError("--lineage, --skip-rejected, --stop-serving and --accept-lost go with --relearn.")
    with deal.screen.working("looking"):
        plan = deal.service.plan_deletion(arrival)
    shown = show_forget_plan(plan, "Would be removed")
    if dry_run:
        return CommandResult(plan, shown)
    if not yes:
        confirm(deal, shown, "Remove all this? It cannot be undone.")
    done = deal.service.delete(arrival, reason=reason)
    sentence = f"Arrival {done.plan.sha256[:12]} of {done.plan.task} was {done.tombstone.said}."
    shown = [*show_forget_plan(done.plan, "Removed"), f"[bold]{escape(sentence)}[/]"]
    if done.waits_for_mlflow:
        shown.append(
            f"[yellow]MLflow does not answer, and its reports of {escape(', '.join(done.waits_for_mlflow))} may still "
            "quote the rows. The next run of the lineage, or deal server sync, removes them.[/]"
        )
    return CommandResult(done, shown)


def _relearn(
    deal: Session, lineage: str | None, arrival: str, *, dry_run: bool, yes: bool, **options: Any
) -> CommandResult[Any]:
    with deal.screen.working("looking"):
        from tasks.lineage.settings import only_lineage

        versions = deal.lineage(lineage or os.environ.get("DEAL_LINEAGE") or only_lineage(deal.store))
        plan = versions.plan_relearn(arrival, stops_serving=options["stops_serving"])
    shown = [*show_forget_plan(plan.forget, "Would be removed", relearns=True), *show_branch_plan(plan)]
    if dry_run:
        return CommandResult(plan, shown)
    if not yes:
        confirm(deal, shown, "Remove the rows, and learn the rest again? It cannot be undone.")
    done = versions.relearn(arrival, **options)
    return CommandResult(
        done,
        [
            *render(done.made, "Made again"),
            *show_compared(done.before, done.accuracies, done.num_rows),
            f"[bold]{escape(done.message)}[/]",
            *_show_attestation(done),
        ],
        rejected=done.status == "stopped",
    )


def _show_attestation(done: BranchResult) -> Iterable[RenderableType]:
    attestation, rows = done.attestation, done.branch.deleted
    if attestation is None or rows is None:
        return
    yield f"Without an adapter now: version {', '.join(attestation.removed) or '–'}."
    if rows.others:
        yield f"Versions of other lineages saw the rows, and stay: {escape(', '.join(rows.others))}."
    if attestation.exports_removed:
        yield f"Exports that were removed: {escape(', '.join(attestation.exports_removed))}."
    if attestation.exports_left:
        yield f"[yellow]Remove these exports by hand: {escape(', '.join(attestation.exports_left))}.[/]"
    yield from _show_unknown(attestation.unknown)
    if attestation.waits_for_mlflow:
        yield "[yellow]MLflow does not answer; deal server sync removes its copies.[/]"
    yield escape(f"The attestation: deal lineage branch {done.lineage} --json.")


def _show_unknown(unknown: Sequence[UnknownRows]) -> Iterable[RenderableType]:
    """The rows whose inputs are not known, so that logged answers to them may be left."""
    for rows in unknown:
        number = "an unknown number of" if rows.num_rows is None else str(rows.num_rows)
        why = "is damaged" if rows.why == "damaged" else "is not stored any more, nor are the files that it came from"
        yield (
            f"[yellow]Not known: {number} rows of {rows.file} of dataset {rows.dataset_sha256[:12]}, because the file "
            f"{why}. The prediction log was not searched for answers to them.[/]"
        )


def confirm(deal: Session, shown: Iterable[RenderableType], question: str) -> None:
    """Ask on the terminal.

    Raises:
        ConfigError: there is no terminal, so --yes has to be given.
    """
    if deal.screen.as_json or not sys.stdin.isatty():
        raise ConfigError("Nothing can be asked here: give --yes, or --dry-run to see what happens.")
    deal.screen.result(None, *shown)
    typer.confirm(question, abort=True)


def show_forget_plan(plan: ForgetPlan, title: str, *, relearns: bool = False) -> Sequence[RenderableType]:
    """What is removed, what cannot be, and what follows; with `relearns` the versions are made again."""
    title = f"{title}: rows of arrival {plan.sha256[:12]} of {plan.task}"
    held = render(plan.held, title) or [heading(title), "No rows of it are left here."]
    return [*held, *_show_learned(plan.learned, relearns=relearns), *_show_consequences(plan)]


def _show_learned(learned: Sequence[AffectedVersion], *, relearns: bool) -> Iterable[RenderableType]:
    if not learned:
        return ["No version has learned from it."]
    advice = (
        "Their weights still hold what they learned. If that has to go too, make them again without it: "
        "deal data delete ARRIVAL --relearn."
    )
    return [*render(learned, "Versions that learned from it"), *([] if relearns else [advice])]


def _show_consequences(plan: ForgetPlan) -> Iterable[RenderableType]:
    if plan.unjudged:
        yield escape(
            f"They are the test rows of {plan.task} in lineage {', '.join(plan.unjudged)}: without them no new version "
            "can be evaluated on it. The next arrival of the task has to bring test rows, which take their place."
        )
    if plan.shared_with:
        yield escape(
            "Other arrivals came with one of the same files (the task's test rows, say) and still hold its rows; "
            f"forget them too if they have to go: {', '.join(sha256[:12] for sha256 in plan.shared_with)}"
        )
    if plan.harvested:
        yield escape(
            "These files in the inbox have texts of the logged answers, from feedback that was harvested. They stay: "
            f"forget them too (deal data delete KEY) if the texts have to go: {', '.join(plan.harvested)}"
        )
    yield from _show_unknown(plan.unknown)
    yield "A copy of the file outside the inbox, backups and log files are not looked at: see docs/delete.md."
