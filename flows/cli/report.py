"""The command that writes the page of a version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.cli.session import Debug, Home, Json, Lineage, session

report_app = typer.Typer()


@report_app.command()
def report(
    version: Annotated[str, typer.Argument(help="Number of the version.")],
    lineage: Lineage = "default",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML file.", show_default="HOME/reports/LINEAGE-VERSION.html"),
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a version's page again, from MLflow alone: verdict, accuracy, what it gained and lost, data, timings."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("reading"):
            from tasks.adaptation.report import save_report

            written = save_report(lineage, version, out or deal.home / "reports" / f"{lineage}-{version}.html")
        reasons = [f"  • {reason}" for reason in written.reasons]
        shown = [written.summary, *reasons, f"Page: {written.file}"]
        deal.screen.result(written.model_dump(mode="json"), *map(escape, shown))
