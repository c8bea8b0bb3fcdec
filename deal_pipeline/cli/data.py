"""Commands about stored data: list, release, delete and gc."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.filesize import decimal
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_pipeline.cli.branch import AcceptLost, SkipRejected, show_branch_plan, show_compared, show_made
from deal_pipeline.cli.console import heading, new_table
from deal_pipeline.cli.session import CommandResult, Lineage, Session, command, reason_option

if TYPE_CHECKING:
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
    from tasks.housekeeping.arrivals import list_data as list_arrivals

    arrivals = list_arrivals(deal.store)
    numbers = ["training rows", "test rows"]
    columns = ("arrival", "file", "landed", "task", *numbers, "learned by", "state")
    table = new_table(*columns, right=numbers, spare=["landed"])
    for arrival in arrivals:
        learned = ", ".join(arrival.learned_by) or "–"
        counts = ("–" if number is None else str(number) for number in (arrival.num_train, arrival.num_test))
        landed = "–" if arrival.landed is None else f"{arrival.landed.astimezone():%Y-%m-%d %H:%M}"
        file = "–" if arrival.file is None else escape(arrival.file)
        cells = (escape(arrival.name), file, landed, escape(arrival.task), *counts, escape(learned))
        table.add_row(*cells, escape(arrival.state))
    if not arrivals:
        return CommandResult(arrivals, ["No arrival has been learned or is held. What waits in the inbox: deal status"])
    return CommandResult(arrivals, [heading("Arrivals"), table])


@dataclass(frozen=True, kw_only=True)
class ReleasedArrivals:
    """Arrivals of a lineage that were held and go on."""

    lineage: str
    released: tuple[str, ...]
    """As inbox/TASK/FILE, or the address of a file from elsewhere."""


@command(
    data_app, "reading", "deal data release inbox/bank/may.csv", "deal data release --all", works_without_home=True
)
def release(
    deal: Session,
    arrivals: Annotated[
        list[str] | None, Argument(help="Held arrivals, as inbox/TASK/FILE or a path.", show_default=False)
    ] = None,
    all_: Annotated[bool, Option("--all", help="Release every held arrival of the lineage.")] = False,
    lineage: Lineage = "",
) -> CommandResult[ReleasedArrivals]:
    """Let arrivals go on that are held: their run was cancelled, or their labels disagree with the champion."""
    from tasks.arrivals import release as release_arrivals

    if all_ == bool(arrivals):
        raise ConfigError("Name the held arrivals (deal status lists them), or give --all.")
    released = ReleasedArrivals(lineage=lineage, released=release_arrivals(deal.store, lineage, arrivals or []))
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
    from flows.gc import collect

    outcome = deal.run(lambda: collect(lineage, older_than, dry_run), "looking", in_prefect=False)
    return CommandResult(outcome, _show_gc(outcome), failed=bool(outcome.problems))


def _show_gc(result: GcResult) -> Sequence[RenderableType]:
    left = [f"[yellow]{escape(name)} was at work and left alone.[/]" for name in result.busy]
    left += [f"[red]{escape(f'{name}: {problem}')}[/]" for name, problem in result.problems.items()]
    if not result.removals:
        return [*left, "Nothing to remove."]
    table = new_table("lineage", "what", "where", "size", "why", right=["size"])
    for each in result.removals:
        cells = (each.lineage or "–", each.kind, each.address, decimal(each.num_bytes), each.reason)
        table.add_row(*map(escape, cells))
    done = "would be removed" if result.dry_run else "removed"
    total = f"{len(result.removals)} {done}, {decimal(result.num_bytes)}"
    return [*left, heading("Would be removed" if result.dry_run else "Removed"), table, f"[bold]{total}[/]"]


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
        from flows.forget import forget as forget_flow
        from flows.forget import plan_forget

        plan = plan_forget(arrival)
    shown = show_forget_plan(plan, "Would be removed")
    if dry_run:
        return CommandResult(plan, shown)
    if not yes:
        confirm(deal, shown, "Remove all this? It cannot be undone.")
    done = deal.run(lambda: forget_flow(arrival, reason), "forgetting", makes_room=True)
    said = f"Arrival {done.plan.sha256[:12]} of {done.plan.task} was {done.tombstone.said}."
    shown = [*show_forget_plan(done.plan, "Removed"), f"[bold]{escape(said)}[/]"]
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
        from flows.relearn import plan_relearn
        from flows.relearn import relearn as relearn_flow
        from tasks.lineage.settings import only_lineage

        name = lineage or os.environ.get("DEAL_LINEAGE") or only_lineage(deal.store)
        plan = plan_relearn(name, arrival, stops_serving=options["stops_serving"], who=deal.account)
    shown = [*show_forget_plan(plan.forget, "Would be removed", relearns=True), *show_branch_plan(plan)]
    if dry_run:
        return CommandResult(plan, shown)
    if not yes:
        confirm(deal, shown, "Remove the rows, and learn the rest again? It cannot be undone.")
    done = deal.run(lambda: relearn_flow(name, arrival, who=deal.account, **options), "looking", trains=True)
    return CommandResult(
        done,
        [
            *show_made(done.made),
            *show_compared(done.before, done.accuracies, done.num_rows),
            f"[bold]{escape(done.message)}[/]",
            *_attested(done),
        ],
        rejected=done.status == "stopped",
    )


def _attested(done: BranchResult) -> Iterable[RenderableType]:
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
    yield from _unknown(attestation.unknown)
    if attestation.waits_for_mlflow:
        yield "[yellow]MLflow does not answer; deal server sync removes its copies.[/]"
    yield escape(f"The attestation: deal lineage branch {done.lineage} --json.")


def _unknown(unknown: Sequence[UnknownRows]) -> Iterable[RenderableType]:
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
    table = new_table("what", "where", "size", right=["size"])
    for each in plan.held:
        table.add_row(each.kind, escape(each.address), decimal(each.num_bytes) if each.num_bytes else "–")
    held = table if plan.held else "No rows of it are left here."
    title = f"{title}: rows of arrival {plan.sha256[:12]} of {plan.task}"
    return [heading(title), held, *_learned(plan.learned, relearns=relearns), *_follows(plan)]


def _learned(learned: Sequence[AffectedVersion], *, relearns: bool) -> Iterable[RenderableType]:
    if not learned:
        return ["No version has learned from it."]
    table = new_table("lineage", "version", "task", "how", "gate", "alias", right=["version"])
    for each in learned:
        table.add_row(
            escape(each.lineage),
            each.version,
            escape(each.task),
            "trained on it" if each.is_direct else "continues one that was",
            "accepted" if each.accepted else "rejected",
            " ".join(each.aliases),
        )
    advice = (
        "Their weights still hold what they learned. If that has to go too, make them again without it: "
        "deal data delete ARRIVAL --relearn."
    )
    return [heading("Versions that learned from it"), table, *([] if relearns else [advice])]


def _follows(plan: ForgetPlan) -> Iterable[RenderableType]:
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
    yield from _unknown(plan.unknown)
    yield "A copy of the file outside the inbox, backups and log files are not looked at: see docs/delete.md."
