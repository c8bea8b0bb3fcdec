"""How the commands around a server show their results to people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from flows.cli.tables import heading, new_table

if TYPE_CHECKING:
    from flows.server.stack import Stack
    from flows.server.status import RunStatus, Status
    from tasks.lineage.rebuild import RebuildResult


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
        num_open = "–" if each.num_open is None else str(each.num_open)
        lineages.add_row(escape(each.lineage), each.champion or "–", num_open)
    shown += [heading("Lineages"), lineages]
    shown += [f"  [red]•[/] {escape(problem)}" for each in status.lineages for problem in each.failed]
    shown += [f"[red]•[/] {escape(problem)}" for problem in (*status.damaged, *status.problems)]
    for title, runs in (("Running", status.running), ("Waiting", status.waiting), ("Failed, last 24 h", status.failed)):
        if runs:
            shown += [heading(title), _runs(runs)]
    return shown


def show_rebuild(found: RebuildResult) -> Sequence[RenderableType]:
    """What was registered again, and what could not be."""
    names = ", ".join(f"{alias} {version}" for alias, version in found.aliases.items()) or "no alias"
    lines = [f"Lineage {found.lineage}: {len(found.versions)} versions are registered again ({names})."]
    if found.left_out:
        lines.append(f"Numbers that stay unused: {', '.join(found.left_out)}.")
    return [*map(escape, lines), *(f"[red]•[/] {escape(problem)}" for problem in found.problems)]


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
