"""The command by which a task gains labels."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from deal_core.printable import listed
from flows.cli.session import Debug, Home, Json, Lineage, session

labels_app = typer.Typer()


@labels_app.command()
def labels(
    task: Annotated[str, typer.Argument(help="Task that the lineage knows.")],
    add: Annotated[list[str], typer.Option("--add", help="Label that its next arrivals may bring; several times.")],
    lineage: Lineage = "default",
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Give a task labels beside those that it was learned with."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("reading"):
            from tasks.lineage.labels import add_labels

            found = add_labels(lineage, task, add)
        shown = [f"There already: {listed(found.present)}."] if found.present else []
        if found.added:
            gained = f"{task} of lineage {lineage} gains: {listed(found.added)}."
            shown += [gained, "Land the file again that had rows with them; in an inbox, under another name."]
        shown.append(f"Its labels: {listed(found.labels)}.")
        deal.screen.result(found.model_dump(mode="json"), *map(escape, shown))
