"""Commands that keep house: remove garbage, forget an arrival; and prediction in bulk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deal_core.errors import ConfigError
from flows.cli.session import FAILED, Debug, Home, Json, Session, session

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
        from flows.cli.tables_keeping import show_gc

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
        from flows.cli.tables_keeping import show_forget_plan, show_forgotten

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
        from tasks.serving.predict_file import predict_file

        calm_libraries()
        outcome = predict_file(
            data, lineage=lineage, task=task, version=version, out=out, column=column,
            on_progress=lambda done, total: deal.screen.advanced("answering", done, total),
        )  # fmt: skip
    from flows.cli.tables_keeping import show_file_answers

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
