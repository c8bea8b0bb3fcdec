"""Commands that keep house: remove garbage, forget an arrival; and prediction in bulk."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from deal_core.errors import ConfigError
from flows.cli.session import FAILED, Debug, Home, Json, Session, session
from flows.cli.tables import heading, new_table

if TYPE_CHECKING:
    from flows.forget import ForgetResult
    from flows.gc import GcResult
    from tasks.housekeeping.forgetting import AffectedVersion, ForgetPlan
    from tasks.serving.predict import FileAnswers

keeping_app = typer.Typer()


@keeping_app.command()
def gc(
    lineage: Annotated[
        str | None, typer.Option("--lineage", "-l", help="Only this lineage.", show_default="all")
    ] = None,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Age of what may go: 12h, 30d, 4w.")
    ] = "30d",
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only list what would be removed.")] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove left-over checkpoints, old rejected adapters and stored training rows that nobody needs again."""
    with session(home, as_json, debug) as deal:

        def start() -> Any:
            from flows.gc import gc as gc_flow

            return gc_flow(lineage, older_than, dry_run)

        outcome = deal.run(start, "looking", makes_room=True)

        deal.screen.result(outcome.model_dump(mode="json"), *show_gc(outcome))
        if outcome.problems:
            raise typer.Exit(FAILED)


@keeping_app.command()
def forget(
    arrival: Annotated[
        str, typer.Argument(help="Digest of the dataset, its first characters, or its key inbox/TASK/FILE.")
    ],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the history; nothing of the rows.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove an arrival's rows wherever they lie, and name every version that learned from it."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("looking"):
            from flows.forget import plan_forget

            plan = plan_forget(arrival)

        if dry_run:
            deal.screen.result(plan.model_dump(mode="json"), *show_forget_plan(plan))
            return
        if not yes:
            _confirm(deal, *show_forget_plan(plan))

        def start() -> Any:
            from flows.forget import forget as forget_flow

            return forget_flow(arrival, reason)

        outcome = deal.run(start, "forgetting", makes_room=True)
        deal.screen.result(outcome.model_dump(mode="json"), *show_forgotten(outcome))


def answer_file(
    deal: Session, text: str | None, data: Path, *, lineage: str, task: str | None, version: str | None,
    out: Path | None, column: str | None,
) -> None:
    """The part of `deal predict` that answers a file."""
    if text is not None:
        raise ConfigError("Give either a text or --data FILE, not both.")
    with deal.screen.working("reading"):
        from flows.server.embedded import calm_libraries
        from tasks.serving.predict import predict_file

        calm_libraries()
        outcome = predict_file(
            data, lineage=lineage, task=task, version=version, out=out, column=column,
            on_progress=lambda done, total: deal.screen.advanced("answering", done, total),
        )  # fmt: skip

    deal.screen.result(outcome.model_dump(mode="json"), *show_file_answers(outcome))


def _confirm(deal: Session, *shown: Any) -> None:
    """Ask on the terminal.

    Raises:
        ConfigError: there is none to ask on.
    """
    if deal.screen.as_json or not sys.stdin.isatty():
        raise ConfigError("Rows that are removed cannot be brought back: give --yes, or --dry-run to see which.")
    for renderable in shown:
        deal.screen.out.print(renderable, soft_wrap=isinstance(renderable, str))
    typer.confirm("Remove all this for good?", abort=True)


def size(num_bytes: float) -> str:
    """A number of bytes in the unit that suits it.

    Example:
        >>> size(1536)
        '1.5 kB'
    """
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GB"


def show_gc(result: GcResult) -> Sequence[RenderableType]:
    """What went, or would go."""
    left = [f"[yellow]{escape(name)} was at work and left alone.[/]" for name in result.busy]
    left += [f"[red]{escape(f'{name}: {problem}')}[/]" for name, problem in result.problems.items()]
    if not result.removals:
        return [*left, "Nothing to remove."]
    table = new_table("lineage", "what", "where", "size", "why", right=["size"])
    for each in result.removals:
        cells = (each.lineage or "–", each.kind, each.address, size(each.num_bytes), each.reason)
        table.add_row(*map(escape, cells))
    done = "would be removed" if result.dry_run else "removed"
    total = f"{len(result.removals)} {done}, {size(result.num_bytes)}"
    return [*left, heading("Would be removed" if result.dry_run else "Removed"), table, f"[bold]{total}[/]"]


def show_forget_plan(plan: ForgetPlan) -> Sequence[RenderableType]:
    """What would go, what cannot, and what follows."""
    return [*_held(plan, "Would be removed"), *_learned(plan.learned), *_follows(plan)]


def show_forgotten(result: ForgetResult) -> Sequence[RenderableType]:
    """What went, and who learned from it."""
    plan = result.plan
    said = f"Arrival {plan.sha256[:12]} of {plan.task} was {result.tombstone.said}."
    return [*_held(plan, "Removed"), *_learned(plan.learned), *_follows(plan), f"[bold]{escape(said)}[/]"]


def show_file_answers(result: FileAnswers) -> Sequence[RenderableType]:
    """Where the answers are."""
    resumed = f", {result.num_resumed} of them by an earlier call" if result.num_resumed else ""
    shown = [
        f"{result.out}: {result.num_rows} rows answered by version {result.version} of {result.lineage} "
        f"as {result.task}{resumed}, {result.seconds:.1f} s"
    ]
    if result.num_bad:
        shown.append(f"{result.num_bad} rows have no answer; the column {result.columns['problem']} says why.")
    renamed = [name for name, column in result.columns.items() if name != column]
    if renamed:
        shown.append(f"The file has columns of these names already, so ours are called deal_…: {', '.join(renamed)}")
    return [escape(line) for line in shown]


def _held(plan: ForgetPlan, title: str) -> Iterable[RenderableType]:
    table = new_table("what", "where", "size", right=["size"])
    for each in plan.held:
        where = f"{each.address} of MLflow run {each.run_id}" if each.run_id else each.address
        table.add_row(each.kind, escape(where), size(each.num_bytes) if each.num_bytes else "–")
    none = "No rows of it are left here." if not plan.held else table
    return [heading(f"{title}: rows of arrival {plan.sha256[:12]} of {plan.task}"), none]


def _learned(learned: Sequence[AffectedVersion]) -> Iterable[RenderableType]:
    if not learned:
        return ["No version has learned from it."]
    table: Table = new_table("lineage", "version", "task", "how", "gate", "alias", right=["version"])
    for each in learned:
        table.add_row(
            escape(each.lineage), each.version, escape(each.task),
            "trained on it" if each.is_direct else "continues one that was",
            "accepted" if each.accepted else "rejected", " ".join(each.aliases),
        )  # fmt: skip
    advice = (
        "Their weights still hold what they learned. If that has to go too, make a version before them champion "
        "(deal history, deal promote), or start a new lineage."
    )
    return [heading("Versions that learned from it"), table, advice]


def _follows(plan: ForgetPlan) -> Iterable[RenderableType]:
    if plan.unjudged:
        yield escape(
            f"These rows judge {plan.task} in lineage {', '.join(plan.unjudged)}: without them no new version can be "
            "judged on it. The next arrival of the task has to bring test rows; they judge it from then on."
        )
    if plan.shared_with:
        yield escape(
            "Other arrivals came with one of the same files (the task's test rows, say) and still hold its rows; "
            f"forget them too if they have to go: {', '.join(sha256[:12] for sha256 in plan.shared_with)}"
        )
    yield "A copy of the file outside the inbox, backups and log files are not looked at: see docs/housekeeping.md."
