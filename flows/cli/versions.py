"""Commands by which a person decides what serves: promote, rollback, reject, requeue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from flows.cli.session import Debug, Home, Json, Lineage, exit_if_rejected, session
from flows.cli.tables import heading, new_table

if TYPE_CHECKING:
    from flows.promote import Decision, LeftBehind
    from infra.promotions import Move

promotion_app = typer.Typer()

Version = Annotated[str, typer.Argument(help="Number of the version.")]
Why = Annotated[str, typer.Option("--why", help="Reason, for the promotion log.")]


@promotion_app.command()
def promote(
    version: Version, lineage: Lineage = "default", why: Why = "approved", home: Home = None, as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a version that continues the champion the champion; the next arrival continues from it."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("promoting"):
            from flows.promote import current_account, promote_to

            done = promote_to(lineage, version, who=current_account(), why=why)
        _show(deal, done)


@promotion_app.command()
def rollback(
    to: Annotated[
        str | None,
        typer.Option("--to", help="Version to go back to.", show_default="the one that the champion continues"),
    ] = None,
    lineage: Lineage = "default", why: Why = "rolled back by hand", home: Home = None, as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make an earlier version the champion again, at once; what it has not learned is listed."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("rolling back"):
            from flows.promote import current_account, roll_back

            done = roll_back(lineage, to, who=current_account(), why=why)
        _show(deal, done)


@promotion_app.command()
def reject(
    version: Version,
    why: Annotated[str, typer.Option("--why", help="Reason, for the promotion log.", show_default=False)],
    lineage: Lineage = "default", home: Home = None, as_json: Json = False, debug: Debug = False,
) -> None:
    """Refuse a version for good; it can never become champion."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("rejecting"):
            from flows.promote import current_account, reject_version

            done = reject_version(lineage, version, who=current_account(), why=why)
        _show(deal, done)


@promotion_app.command()
def requeue(
    version: Annotated[list[str] | None, typer.Argument(help="Versions to learn again.")] = None,
    learn: Annotated[
        bool, typer.Option("--learn", help="Learn all that were left behind; without it or a version they are listed.")
    ] = False,
    lineage: Lineage = "default", home: Home = None, as_json: Json = False, debug: Debug = False,
) -> None:
    """List the arrivals that a rollback left behind, or learn them again on top of the champion."""
    with session(home, as_json, debug) as deal:
        from flows.cli.tables import show_adaptation

        if not (learn or version):
            with deal.screen.working("reading"):
                from flows.promote import find_left_behind

                found = find_left_behind(lineage)
            deal.screen.result([each.model_dump(mode="json") for each in found], *show_left_behind(lineage, found))
            return

        def start() -> Any:
            from flows.promote import requeue as requeue_flow

            return requeue_flow(lineage, version or [])

        runs = deal.run(start)
        shown = [line for run in runs for line in show_adaptation(run)] or show_left_behind(lineage, ())
        deal.screen.result([run.model_dump(mode="json") for run in runs], *shown)
        exit_if_rejected(any(run.rejected for run in runs))


def _show(deal: Any, done: Any) -> None:

    deal.screen.result(done.model_dump(mode="json"), *show_decision(done))


def show_decision(done: Decision) -> Sequence[RenderableType]:
    """What was decided, and what it leaves behind."""
    if done.action == "rejected":
        serves = f"version {done.champion} serves on" if done.champion else "no version serves"
        return [f"[bold]Version {done.version} of {escape(done.lineage)} is rejected; {serves}.[/]"]
    before = f"version {done.before}" if done.before else "none"
    shown: list[RenderableType] = [
        f"[bold green]Champion of {escape(done.lineage)}: version {done.champion}[/] (before: {before})"
    ]
    if done.left_behind:
        shown += ["It has not learned:", _learned(done.left_behind), _remedy(done.lineage)]
    return shown


def show_left_behind(lineage: str, found: Sequence[LeftBehind]) -> Sequence[RenderableType]:
    """Arrivals that the champion has not learned."""
    if not found:
        return [f"The champion of {escape(lineage)} has learned every accepted arrival."]
    return [heading(f"Left behind in {lineage}"), _learned(found), _remedy(lineage)]


def show_moves(lineage: str, moves: Sequence[Move]) -> Sequence[RenderableType]:
    """The promotion log."""
    table = new_table("when", "what", "version", "champion", "who", "why", right=["version", "champion"])
    for move in moves:
        table.add_row(
            f"{move.when.astimezone():%Y-%m-%d %H:%M:%S}", move.action, move.version, move.champion or "–",
            escape(move.who), escape(move.why),
        )  # fmt: skip
    return [heading(f"Moves of {lineage}"), table]


def _learned(found: Sequence[LeftBehind]) -> RenderableType:
    table = new_table("version", "task", "dataset", right=["version"])
    for each in found:
        table.add_row(each.version, escape(each.task), each.dataset_sha256[:12])
    return table


def _remedy(lineage: str) -> str:
    return f"Learn it again with: deal requeue --learn --lineage {escape(lineage)}"
