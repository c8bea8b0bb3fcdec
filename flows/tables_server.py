"""How the commands around a server show their results to people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from flows.tables import heading, new_table

if TYPE_CHECKING:
    from flows.stack import Stack
    from flows.status import RunStatus, Status


def show_stack(stack: Stack) -> Sequence[RenderableType]:
    """What is up, and where to look."""
    return [
        "[bold green]Everything is up.[/] Files that land in the inbox are adapted by themselves.",
        f"  runs        {stack.prefect_url}",
        f"  versions    {stack.mlflow_url}",
        "  what waits  deal status",
        "  end it      deal down",
    ]


def show_status(status: Status) -> Sequence[RenderableType]:
    """Processes, lineages, runs."""
    shown: list[RenderableType] = []
    if status.parts:
        table = new_table("process", "state", "log")
        for part in status.parts:
            table.add_row(part.name, "[green]up[/]" if part.is_alive else "[red]gone[/]", escape(part.log))
        shown += [heading("Processes"), table]
    elif not status.prefect_url:
        shown.append("No server: files are adapted by deal adapt and deal watch. Start one with: deal up")
    lineages = new_table("lineage", "champion", "open arrivals", right=["champion", "open arrivals"])
    for each in status.lineages:
        lineages.add_row(escape(each.lineage), each.champion or "–", str(each.num_open))
    shown += [heading("Lineages"), lineages]
    shown += [f"  [red]•[/] {escape(problem)}" for each in status.lineages for problem in each.failed]
    shown += [f"[red]•[/] {escape(problem)}" for problem in status.problems]
    for title, runs in (("Running", status.running), ("Waiting", status.waiting), ("Failed, last 24 h", status.failed)):
        if runs:
            shown += [heading(title), _runs(runs)]
    return shown


def _runs(runs: Sequence[RunStatus]) -> RenderableType:
    table = new_table("run", "state", "for", "why", right=["for"])
    now = datetime.now(UTC)
    for run in runs:
        table.add_row(escape(run.name), run.state, _ago((now - run.since).total_seconds()), escape(run.message))
    return table


def _ago(seconds: float) -> str:
    """A duration in its largest unit that is not zero."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
