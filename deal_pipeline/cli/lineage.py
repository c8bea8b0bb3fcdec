"""Commands about lineages that learn from the inbox, and about the tasks of a lineage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_core.safe_text import listed
from deal_pipeline.cli.branch import AcceptLost, SkipRejected, show_branch, show_branch_plan, show_compared
from deal_pipeline.cli.console import show_adaptation
from deal_pipeline.cli.data import confirm
from deal_pipeline.cli.render import render
from deal_pipeline.cli.session import CommandResult, LineageOption, Session, command, reason_option

if TYPE_CHECKING:
    from deal_pipeline.results import LineageFile
    from flows.adapt_result import AdaptResult
    from flows.branch import BranchPlan, BranchResult
    from infra.branches import KnownBranch
    from tasks.lineage.consolidation import ConsolidationPlan
    from tasks.lineage.requests import LabelsResult, RenewalResult
    from tasks.lineage.settings import LineageWithPause

lineage_app = typer.Typer(help="Lineages that learn from the inbox.", no_args_is_help=True)
task_app = typer.Typer(help="Add labels or renew the test rows of a task.", no_args_is_help=True)
LineageName = Annotated[str, Argument(help="Name of the lineage.")]
TaskName = Annotated[str, Argument(help="Task that the lineage knows.")]


@command(lineage_app, "reading", "deal lineage apply bank.yaml", "deal lineage apply bank.yaml --home /srv/deal")
def apply(
    deal: Session,
    spec: Annotated[
        Path, Argument(help="Lineage settings (YAML). `tasks:` names the tasks that it learns; without it, all.")
    ],
) -> CommandResult[LineageFile]:
    """Let a lineage learn from the inbox, or change its settings."""
    written = deal.service.apply(spec)
    return CommandResult(written, [escape(f"{written.lineage} is in {written.file}")])


@command(lineage_app, "reading", "deal lineage list", "deal lineage list --json", name="list", works_without_home=True)
def list_(deal: Session) -> CommandResult[list[LineageWithPause]]:
    """List the lineages that learn from the inbox."""
    from infra.versions import Versions
    from tasks.lineage.settings import list_settings

    lineages = deal.service.lineages()
    shown = [
        f"{lineage.lineage}: {', '.join(lineage.tasks) or 'every task'}"
        + (f" (paused: {lineage.held})" if lineage.held else "")
        for lineage in lineages
    ]
    if files := list_settings(deal.store):
        shown += [
            f"{name}: has versions and no file, so it learns by deal adapt alone"
            for name in Versions(deal.store).lineages()
            if name not in files
        ]
    else:
        shown += ["No lineage has a file. As soon as one has (deal lineage apply SPEC), only those with a file learn."]
    return CommandResult(lineages, [*map(escape, shown)])


@command(
    lineage_app,
    "reading",
    "deal lineage pause bank",
    'deal lineage pause bank --reason "labels of May are checked"',
    works_without_home=True,
)
def pause(
    deal: Session,
    lineage: LineageName,
    reason: Annotated[str, reason_option("people who look at the lineage")] = "by command",
) -> CommandResult[LineageWithPause]:
    """Pause a lineage. A running training finishes; new files wait until `resume`."""
    paused = deal.lineage(lineage).pause(reason)
    shown = f"{lineage} is paused: {reason}. Let it learn again with: deal lineage resume {lineage}."
    return CommandResult(paused, [escape(shown)])


@command(lineage_app, "reading", "deal lineage resume bank", "deal lineage resume bank --json", works_without_home=True)
def resume(deal: Session, lineage: LineageName) -> CommandResult[LineageWithPause]:
    """Let a paused lineage learn again. Files that landed meanwhile are learned."""
    resumed = deal.lineage(lineage).resume()
    return CommandResult(resumed, [escape(f"{lineage} learns what lands.")])


@command(
    lineage_app,
    None,
    "deal lineage rebase support --base HuggingFaceTB/SmolLM2-360M-Instruct --dry-run",
    "deal lineage rebase support --base models/new --yes",
)
def rebase(
    deal: Session,
    lineage: LineageName,
    base: Annotated[str, Option("--base", help="The new base model: Hub id, folder or GGUF file.")],
    dry_run: Annotated[bool, Option("--dry-run", "-n", help="Only show what would be learned, and what lost.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    skip_rejected: SkipRejected = False,
    accept_lost: AcceptLost = False,
    engine: Annotated[
        list[str] | None,
        Option(help="Address of a vLLM server: wait with the swap until one of them has the new base model."),
    ] = None,
) -> CommandResult[Annotated[BranchPlan, "with --dry-run"] | BranchResult]:
    """Learn a lineage's arrivals again on another base model, and make the result champion if no task is worse."""
    with deal.screen.working("looking"):
        versions = deal.lineage(lineage)
        plan = versions.plan_rebase(base)
    shown = show_branch_plan(plan)
    if dry_run:
        return CommandResult(plan, shown)
    if not yes:
        confirm(deal, shown, "Learn all this on the new base model?")
    done = versions.rebase(base, skip_rejected=skip_rejected, accept_lost=accept_lost, engines=engine or ())
    compared = show_compared(done.before, done.accuracies, done.num_rows)
    lines = [*render(done.made, "Made again"), *compared, f"[bold]{escape(done.message)}[/]"]
    return CommandResult(done, lines, rejected=done.status == "stopped")


@command(
    lineage_app,
    "reading",
    "deal lineage branch support",
    "deal lineage branch support --json",
    "deal lineage branch support --give-up",
    'deal lineage branch support --accept --reason "the rows had to go"',
)
def branch(
    deal: Session,
    lineage: LineageName,
    give_up: Annotated[bool, Option("--give-up", help="End the open branch: its champion of before stays.")] = False,
    accept: Annotated[
        bool, Option("--accept", help="Go on with --relearn although the result is worse than the champion.")
    ] = False,
    reason: Annotated[str, reason_option("the promotion log, with --accept")] = "",
) -> CommandResult[list[KnownBranch]]:
    """Show what was made again, with the attestations of deleted rows; or accept an open branch, or give it up."""
    if accept != bool(reason) or (accept and give_up):
        raise ConfigError("Give --accept together with --reason, and without --give-up.", code="accept-reason")
    versions = deal.lineage(lineage)
    if accept:
        done = versions.accept_branch(why=reason)
        entry = versions.branches()[-1]
        shown = [*show_branch(entry), f"[bold]{escape(done.message)}[/]"]
        return CommandResult([entry], shown, rejected=done.status == "stopped")
    branches = [versions.give_up_branch()] if give_up else [*versions.branches()]
    shown = [line for entry in branches for line in show_branch(entry)]
    return CommandResult(branches, shown or [escape(f"Nothing of {lineage} was made again.")])


@command(lineage_app, "reading", "deal lineage show bank", "deal lineage show bank --json", works_without_home=True)
def show(deal: Session, lineage: LineageName) -> CommandResult[LineageWithPause]:
    """Show a lineage's settings: those of its file, and the defaults of all others."""
    import yaml

    settings = deal.lineage(lineage).settings()
    return CommandResult(settings, [escape(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False).rstrip())])


@command(lineage_app, "reading", "deal lineage delete bank", "deal lineage delete bank --json", works_without_home=True)
def delete(deal: Session, lineage: LineageName) -> CommandResult[LineageFile]:
    """Let a lineage learn no longer from the inbox, by deleting its settings. Its versions stay and serve."""
    deleted = deal.lineage(lineage).remove_settings()
    return CommandResult(deleted, [escape(f"{deleted.file} is deleted; its versions stay.")])


@command(
    lineage_app,
    None,
    "deal lineage consolidate bank --dry-run",
    "deal lineage consolidate bank --from champion --yes",
)
def consolidate(
    deal: Session,
    lineage: LineageName,
    start: Annotated[
        Literal["base", "champion"] | None,
        Option("--from", help="Start the training from the base model or the champion.", show_default="base"),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", "-n", help="Only show what would be learned.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
) -> CommandResult[Annotated[ConsolidationPlan, "with --dry-run"] | AdaptResult]:
    """Learn what is left of all arrivals together, as one version that the gate judges against the champion."""
    versions = deal.lineage(lineage)
    with deal.screen.working("looking"):
        planned = versions.plan_consolidation(start)
    if dry_run:
        return CommandResult(planned, show_plan(planned))
    if not yes:
        confirm(deal, show_plan(planned), "Train on all this?")

    outcome = versions.consolidate(planned.start)
    return CommandResult(outcome, show_adaptation(outcome), rejected=outcome.rejected)


def show_plan(planned: ConsolidationPlan) -> Sequence[RenderableType]:
    """What a consolidation learns."""
    from infra.report.page import duration

    title = f"{planned.lineage}, from the {planned.start}, judged against version {planned.champion}"
    shown = render(planned.parts, title)
    shown += [f"Of {escape(task)} {number} kept rows are learned." for task, number in planned.kept.items()]
    shown += [
        f"[yellow]No row of {escape(task)} is left; the champion's skill is all there is.[/]" for task in planned.gone
    ]
    took = "" if planned.seconds is None else f", about {duration(planned.seconds)} of training"
    return [*shown, f"[bold]{planned.num_rows} rows{took}[/]"]


@command(
    task_app,
    "reading",
    'deal task add-label bank "blocked card"',
    'deal task add-label bank "blocked card" "new address" --lineage support',
    name="add-label",
)
def add_label(
    deal: Session,
    task: TaskName,
    labels: Annotated[list[str], Argument(help="Labels that the task's next arrivals may use.")],
    lineage: LineageOption = "",
) -> CommandResult[LabelsResult]:
    """Add labels to a task that the lineage has learned."""
    task_labels = deal.lineage(lineage).add_labels(task, labels)
    shown = [f"There already: {listed(task_labels.present)}."] if task_labels.present else []
    if task_labels.added:
        gained = f"{task} of lineage {lineage} gains: {listed(task_labels.added)}."
        shown += [gained, "Land the file again that had rows with them; in an inbox, under another name."]
    shown.append(f"Its labels: {listed(task_labels.labels)}.")
    return CommandResult(task_labels, [*map(escape, shown)])


@command(
    task_app,
    "reading",
    "deal task renew-tests bank",
    "deal task renew-tests bank --lineage support",
    name="renew-tests",
)
def renew_test_rows(deal: Session, task: TaskName, lineage: LineageOption = "") -> CommandResult[RenewalResult]:
    """Let the task's next arrival bring new test rows. The rows before are measured and shown as a second slice."""
    renewal = deal.lineage(lineage).renew_tests(task)
    shown = f"The test rows of the next arrival of {task} replace those of today."
    kept = f"The {renewal.num_test} test rows of today stay: every report shows both."
    return CommandResult(renewal, [escape(shown), escape(kept)])
