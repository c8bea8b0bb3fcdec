"""`deal monitor`: the live traffic of a lineage's champion against its test rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Option

from flows.cli.session import CommandResult, Lineage, Session, command
from flows.cli.tables import heading, new_table, percent

if TYPE_CHECKING:
    from deal_core.monitoring.report import LiveAccuracy, TaskDrift
    from tasks.monitoring.look import MonitorResult

monitor_app = typer.Typer()


@command(monitor_app, "starting")
def monitor(
    deal: Session,
    lineage: Lineage = "default",
    data: Annotated[
        Path | None,
        Option(
            "--data", "-d",
            help="File of answers instead of the prediction log: its columns, or as deal predict --data writes.",
            show_default=False,
        ),
    ] = None,
    rebase: Annotated[
        bool, Option("--rebase", help="Compare with the present live rows from now on, not with the test rows.")
    ] = False,
) -> CommandResult:  # fmt: skip
    """Compare the champion's live traffic with its test rows: drift, estimated and measured accuracy."""
    from flows.monitor import monitor as monitor_flow

    file = None if data is None else str(data.absolute())
    outcome = deal.run(lambda: monitor_flow(lineage, file, rebase))
    return CommandResult(outcome, show_monitor(outcome))


def show_monitor(result: MonitorResult) -> Sequence[RenderableType]:
    """The tests of each task, its accuracies, and its alarms."""
    if result.drift is None:
        return [escape(result.problem or "")]
    drift = result.drift
    shown: list[RenderableType] = [
        heading(f"Live traffic of {result.lineage}, version {result.version}"), _tests(drift.tasks), *_said(result),
    ]  # fmt: skip
    table = new_table("task", "accuracy", "now", "from", "to", "rows", "test rows",
                      right=["now", "from", "to", "rows", "test rows"])  # fmt: skip
    for each in drift.tasks:
        for word, accuracy in (("measured", each.measured), ("estimated", each.estimated)):
            if accuracy is not None:
                table.add_row(escape(each.task), word, *_accuracy(accuracy))
    if table.row_count:
        shown += [heading("Accuracy, %"), table]
    shown.append(f"[dim]An alarm is significant (p < {drift.level:.1e}, for {drift.num_tests} tests) and large.[/]")
    return shown


def _tests(tasks: Sequence[TaskDrift]) -> RenderableType:
    numbers = ["live rows", "reference", "effect", "limit", "p"]
    table = new_table("task", *numbers[:2], "what", *numbers[2:], "alarm", right=numbers)
    for each in tasks:
        sizes = str(each.num_live), str(each.num_reference)
        if each.status != "compared":
            table.add_row(escape(each.task), *sizes, f"[yellow]{each.status}[/]", "–", "–", "–", "")
        for number, test in enumerate(each.tests):
            first = (escape(each.task), *sizes) if number == 0 else ("", "", "")
            figures = f"{test.effect:.3f}", f"{test.limit:g}", f"{test.p_value:.1e}"
            table.add_row(*first, f"{test.name}, {test.unit}", *figures, "[red]alarm[/]" if test.is_alarm else "")
    return table


def _said(result: MonitorResult) -> list[RenderableType]:
    assert result.drift is not None
    return [
        f"  [red]•[/] {escape(f'{each.task}: {alarm.kind}: {alarm.reason}')}"
        for each in result.drift.tasks for alarm in each.alarms
    ] or ["No alarm."]


def _accuracy(found: LiveAccuracy) -> tuple[str, ...]:
    return (
        percent(found.accuracy), percent(found.low), percent(found.high), str(found.num_rows), percent(found.reference)
    )
