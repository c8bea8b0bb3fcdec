"""Commands about feedback on logged answers: feedback, harvest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument

from flows.cli.session import CommandResult, Lineage, Session, command

if TYPE_CHECKING:
    from tasks.monitoring.feedback import FeedbackResult
    from tasks.monitoring.harvest import HarvestResult

feedback_app = typer.Typer()


@command(feedback_app, "reading")
def feedback(
    deal: Session,
    file: Annotated[Path, Argument(help="CSV, JSON lines or Parquet with id, and label, answer or is_right.")],
    lineage: Lineage = "default",
) -> CommandResult:
    """Take right answers to logged requests, from a file that a person stands behind."""
    from tasks.monitoring.feedback import take_feedback_file

    taken = take_feedback_file(file, lineage)
    return CommandResult(taken, _show_taken(taken))


@command(feedback_app)
def harvest(
    deal: Session,
    task: Annotated[str, Argument(help="Task whose reviewed answers land in its inbox.")],
    lineage: Lineage = "default",
) -> CommandResult:
    """Write reviewed right answers into the inbox, as an ordinary file. Each lands once."""
    from tasks.monitoring.harvest import harvest_feedback

    with deal.screen.working("reading"):
        done = harvest_feedback(task, lineage)
    return CommandResult(done, _show_harvest(done))


def _show_taken(taken: FeedbackResult) -> Sequence[RenderableType]:
    shown = [f"Feedback on {taken.num_taken} answers was taken."]
    if taken.num_blank:
        shown.append(f"{taken.num_blank} rows have no feedback.")
    if taken.num_unknown:
        shown.append(f"The log does not have {taken.num_unknown} of the answers; feedback on them cannot be learned.")
    return [escape(each) for each in shown]


def _show_harvest(done: HarvestResult) -> Sequence[RenderableType]:
    shown = [f"{done.num_rows} rows landed as {done.key}." if done.key else "There is nothing to harvest."]
    shown += [f"  not harvested: {number}, {reason}" for reason, number in done.skipped.items()]
    return [escape(each) for each in shown]
