"""Commands about a lineage's versions: report, labels, and what serves: promote, rollback, reject, requeue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_core.safe_text import listed
from flows.cli.console import heading, new_table, show_adaptation, show_held
from flows.cli.session import CommandResult, Lineage, Session, command, main_app
from infra.store.keys import INBOX, task_of

if TYPE_CHECKING:
    from tasks.inbox import HeldArrival
    from tasks.lineage.promotion import Decision, LeftBehind


Version = Annotated[str, Argument(help="Number of the version.")]
Why = Annotated[str, Option("--why", help="Reason, for the promotion log.")]


@command(main_app, "reading")
def report(
    deal: Session,
    version: Version,
    lineage: Lineage = "default",
    out: Annotated[
        Path | None, Option("--out", "-o", help="The HTML file.", show_default="HOME/reports/LINEAGE-VERSION.html")
    ] = None,
) -> CommandResult:
    """Write a version's page again: verdict, accuracy, gains and losses, data, timings."""
    from tasks.lineage.reports import save_report

    written = save_report(lineage, version, out or deal.home / "reports" / f"{lineage}-{version}.html")
    reasons = [f"  • {reason}" for reason in written.reasons]
    return CommandResult(written, [*map(escape, (written.summary, *reasons, f"Page: {written.file}"))])


@command(main_app, "reading")
def labels(
    deal: Session,
    task: Annotated[str, Argument(help="Task that the lineage knows.")],
    add: Annotated[list[str], Option(help="Label that the task's next arrivals may use. Repeat it for several.")],
    lineage: Lineage = "default",
) -> CommandResult:
    """Add labels to a task that the lineage has learned."""
    from tasks.lineage.requests import add_labels

    found = add_labels(lineage, task, add)
    shown = [f"There already: {listed(found.present)}."] if found.present else []
    if found.added:
        gained = f"{task} of lineage {lineage} gains: {listed(found.added)}."
        shown += [gained, "Land the file again that had rows with them; in an inbox, under another name."]
    shown.append(f"Its labels: {listed(found.labels)}.")
    return CommandResult(found, [*map(escape, shown)])


tests_app = typer.Typer(help="Test rows of tasks.", no_args_is_help=True)


@command(tests_app, "reading")
def renew(
    deal: Session,
    task: Annotated[str, Argument(help="Task that the lineage knows.")],
    lineage: Lineage = "default",
) -> CommandResult:
    """Let the task's next arrival bring new test rows. The rows before are measured and shown as a second slice."""
    from tasks.lineage.requests import renew_tests

    found = renew_tests(lineage, task)
    shown = f"The next arrival of {task} with test rows judges the task from then on."
    kept = f"The {found.num_test} test rows before stay: every report shows both."
    return CommandResult(found, [escape(shown), escape(kept)])


@command(main_app, "promoting")
def promote(deal: Session, version: Version, lineage: Lineage = "default", why: Why = "approved") -> CommandResult:
    """Make a version champion. Its parent must be the present champion."""
    from tasks.lineage.promotion import promote_to

    done = promote_to(lineage, version, who=deal.account, why=why)
    return CommandResult(done, [*show_decision(done), *show_mirrored(lineage)])


@command(main_app, "rolling back")
def rollback(
    deal: Session,
    to: Annotated[str | None, Option(help="Version to go back to.", show_default="the champion's parent")] = None,
    lineage: Lineage = "default",
    why: Why = "rolled back by hand",
) -> CommandResult:
    """Make an earlier version the champion again, at once. The arrivals that it has not learned are listed."""
    from tasks.lineage.promotion import roll_back

    done = roll_back(lineage, to, who=deal.account, why=why)
    return CommandResult(done, [*show_decision(done), *show_mirrored(lineage)])


@command(main_app, "rejecting")
def reject(
    deal: Session,
    version: Version,
    why: Annotated[str, Option(help="Reason, for the promotion log.", show_default=False)],
    lineage: Lineage = "default",
) -> CommandResult:
    """Reject a version. It can never become champion."""
    from tasks.lineage.promotion import reject_version

    done = reject_version(lineage, version, who=deal.account, why=why)
    return CommandResult(done, [*show_decision(done), *show_mirrored(lineage)])


def show_mirrored(lineage: str) -> Sequence[RenderableType]:
    """Bring MLflow in step with a decision; return what it lacks, in one line."""
    from flows.mlflow import mirror

    synced = asyncio.run(mirror(lineage))
    if synced is None:
        return ["MLflow follows when the run that works on the lineage ends."]
    if synced.problem is None:
        return []
    return [
        escape(f"MLflow lacks {listed(synced.missing)}; the next run or deal server sync writes it. {synced.problem}")
    ]


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


@command(main_app, "reading")
def requeue(
    deal: Session,
    what: Annotated[
        list[str] | None,
        Argument(help="Versions to learn again, or held arrivals inbox/TASK/FILE that go on.", show_default=False),
    ] = None,
    learn: Annotated[
        bool,
        Option(
            "--learn",
            help="Learn all arrivals that were left behind, and let all held ones go on. Without it they are listed.",
        ),
    ] = False,
    lineage: Lineage = "default",
) -> CommandResult:
    """List the arrivals that a rollback left behind or that a cancelled run holds, or let them be learned."""
    from flows.requeue import requeue as requeue_flow
    from tasks.arrival_runs import release
    from tasks.inbox import find_held
    from tasks.lineage.history import NoVersionError
    from tasks.lineage.promotion import find_left_behind

    arrivals = [each for each in what or [] if each.startswith(f"{INBOX}/")]
    versions = [each for each in what or [] if not each.startswith(f"{INBOX}/")]
    if arrivals and learn:
        raise ConfigError("Give either arrivals or --learn, not both; --learn lets every held arrival go on.")
    if arrivals and not versions:
        released = release(deal.store, lineage, arrivals)
        shown = [f"{key} goes on: a watch learns it at its next look." for key in released]
        return CommandResult({"lineage": lineage, "released": released}, [*map(escape, shown)])
    if not (learn or versions):
        held = find_held(deal.store, lineage)
        try:
            found = find_left_behind(lineage)
        except NoVersionError:
            if not held:
                raise
            found = ()  # its first arrival is held
        shown_all = [*_show_left_behind(lineage, found), *show_held(lineage, held)]
        return CommandResult([*found, *map(_as_left_behind, held)], shown_all)
    runs = deal.run(lambda: requeue_flow(lineage, versions, arrivals))
    shown_runs = [line for run in runs for line in show_adaptation(run)] or _show_left_behind(lineage, ())
    return CommandResult(runs, shown_runs, rejected=any(run.rejected for run in runs))


def _as_left_behind(held: HeldArrival) -> dict[str, str | None]:
    """A held arrival with the keys of a version that was left behind. It has no version and no dataset yet."""
    return {"version": None, "task": task_of(held.key), "dataset_sha256": None, **held.model_dump()}


def _show_left_behind(lineage: str, found: Sequence[LeftBehind]) -> Sequence[RenderableType]:
    if not found:
        return [f"The champion of {escape(lineage)} has learned every accepted arrival."]
    return [heading(f"Left behind in {lineage}"), _learned(found), _remedy(lineage)]


def _learned(found: Sequence[LeftBehind]) -> RenderableType:
    table = new_table("version", "task", "dataset", right=["version"])
    for each in found:
        table.add_row(each.version, escape(each.task), each.dataset_sha256[:12])
    return table


def _remedy(lineage: str) -> str:
    return f"Learn it again with: deal requeue --learn --lineage {escape(lineage)}"
