"""Commands by which a person decides what serves: promote, rollback, reject, requeue."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows.cli.session import Debug, Home, Json, Lineage, exit_if_rejected, session

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
        from flows.cli.tables_promotion import show_left_behind

        if not (learn or version):
            with deal.screen.working("reading"):
                from flows.requeue import find_left_behind

                found = find_left_behind(lineage)
            deal.screen.result([each.model_dump(mode="json") for each in found], *show_left_behind(lineage, found))
            return

        def start() -> Any:
            from flows.requeue import requeue as requeue_flow

            return requeue_flow(lineage, version or [])

        runs = deal.run(start)
        shown = [line for run in runs for line in show_adaptation(run)] or show_left_behind(lineage, ())
        deal.screen.result([run.model_dump(mode="json") for run in runs], *shown)
        exit_if_rejected(any(run.rejected for run in runs))


def _show(deal: Any, done: Any) -> None:
    from flows.cli.tables_promotion import show_decision

    deal.screen.result(done.model_dump(mode="json"), *show_decision(done))
