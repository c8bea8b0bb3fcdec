"""What the commands share that make versions again: their options, and the plan and the result of a branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from rich.console import RenderableType
from rich.markup import escape
from typer import Option

from deal_core.evaluation.interval import score_text
from deal_core.safe_text import listed
from deal_pipeline.cli.console import heading, new_table

if TYPE_CHECKING:
    from flows.branch import BranchPlan
    from infra.branches import KnownBranch, Remade

SkipRejected = Annotated[
    bool,
    Option("--skip-rejected", help="Go on without an arrival whose new version its gate rejects."),
]
AcceptLost = Annotated[bool, Option("--accept-lost", help="Go on although arrivals cannot be learned again.")]


def show_branch_plan(plan: BranchPlan) -> Sequence[RenderableType]:
    """What a branch would learn, how long that took before, and what would be lost."""
    branch = plan.branch
    start = f"version {branch.root}" if branch.root else "the base model"
    shown: list[RenderableType] = [heading(f"Learned again {branch.what}, from {start} on")]
    if branch.arrivals:
        table = new_table("version", "task", right=["version"])
        for version, task in branch.arrivals.items():
            table.add_row(version, escape(task))
        took = f"It took {plan.seconds / 60:.1f} minutes before." if plan.seconds else ""
        shown += [table, took]
    else:
        shown.append("Nothing.")
    if branch.lost:
        table = new_table("version", "task", "why", right=["version"])
        for each in branch.lost:
            table.add_row(each.version, escape(each.task), escape(each.why))
        shown += [heading("Lost: it cannot be learned again (--accept-lost)"), table]
    serves = "No version serves" if branch.stops_serving else f"Version {branch.champion} serves"
    return [*shown, f"{serves} until the end, and new arrivals wait."]


def show_made(made: Sequence[Remade]) -> Iterable[RenderableType]:
    """The versions that a branch made."""
    if not made:
        return
    table = new_table("version", "made again from", "task", "gate", right=["version", "made again from"])
    for each in made:
        table.add_row(
            each.version, each.remakes, escape(each.task), "[green]accepted[/]" if each.accepted else "[red]rejected[/]"
        )
    yield heading("Made again")
    yield table


def show_compared(
    before: Mapping[str, float], accuracies: Mapping[str, float], num_rows: Mapping[str, int]
) -> Iterable[RenderableType]:
    """What a branch made against the champion that it replaces, by task; `num_rows` are the rows that both answered."""
    if not accuracies:
        return
    table = new_table("task", "before", "now", right=["before", "now"])
    for task, now in accuracies.items():
        table.add_row(escape(task), *(score_text(share, num_rows.get(task)) for share in (before.get(task), now)))
    yield heading("Accuracy against the champion, %")
    yield table


def show_branch(known: KnownBranch) -> Iterable[RenderableType]:
    """A branch, and how it ended."""
    branch, end = known.branch, known.end
    began = f"{branch.began.astimezone():%Y-%m-%d %H:%M}"
    yield heading(f"Branch {branch.number} of {branch.lineage}: {branch.what}")
    yield f"Begun on {began} by {escape(branch.who)}, to replace version {branch.champion}."
    if (judgement := known.judgement) is not None:
        yield from show_compared(judgement.before, judgement.accuracies, judgement.num_rows)
        if judgement.unjudged:
            yield f"Not compared, because no test row judges both versions: {escape(listed(judgement.unjudged))}."
        if judgement.reasons:
            by = judgement.accepted
            what = f"accepted by {by.who}: {by.why}" if by else "nobody has accepted it"
            yield f"[yellow]{escape(' '.join(judgement.reasons))}[/] ({escape(what)})"
    if end is None:
        yield f"[yellow]It is open: new arrivals wait.[/] Go on with: {escape(branch.command)}"
        return
    yield from show_made(end.made)
    outcome = f"version {end.tip} became champion" if end.tip else "it was given up"
    yield f"Ended on {end.ended.astimezone():%Y-%m-%d %H:%M}: {outcome}."
    if (attestation := end.attestation) is not None and (rows := branch.deleted) is not None:
        yield (
            f"Attested: arrival {rows.sha256[:12]} of {escape(rows.task)} ({attestation.num_inputs} inputs known by "
            f"digest) is gone, and so are the adapters of version {', '.join(attestation.removed) or '–'}. All of it: "
            "--json."
        )
