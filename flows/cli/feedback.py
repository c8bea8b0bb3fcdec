"""Commands about right answers to texts: select, feedback, harvest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from flows.cli.session import CommandResult, Lineage, Session, command

if TYPE_CHECKING:
    from tasks.monitoring.feedback import FeedbackResult
    from tasks.monitoring.harvest import HarvestResult
    from tasks.monitoring.select import SelectResult

feedback_app = typer.Typer()


@command(feedback_app)
def select(
    deal: Session,
    task: Annotated[str, Argument(help="Task whose texts are chosen.")],
    lineage: Lineage = "default",
    number: Annotated[int, Option("--number", "-n", min=1, help="Most texts in the file.")] = 50,
    random_share: Annotated[
        float, Option("--random-share", max=1.0, help="Share that is drawn at random, above 0.")
    ] = 0.25,
    data: Annotated[
        Path | None,
        Option(
            "--data", "-d", help="File of texts that the champion answers first: CSV, JSON lines or Parquet.",
            show_default="the prediction log",
        ),
    ] = None,
    column: Annotated[
        str | None,
        Option("--column", help="With --data: the column that holds the texts.", show_default="found by its name"),
    ] = None,
    out: Annotated[
        Path | None, Option("--out", "-o", help="New .csv or .jsonl file.", show_default="TASK-to-label.csv")
    ] = None,
) -> CommandResult:  # fmt: skip
    """Write a file of texts that are worth labelling: the least certain answers, and a random share."""
    if column is not None and data is None:
        raise ConfigError("--column goes with --data; give both, or neither.")
    with deal.screen.working("reading"):
        from flows.server.embedded import calm_libraries
        from tasks.monitoring.select import select_to_label

        calm_libraries()
        done = select_to_label(
            task, lineage, data=data, column=column, out=out, number=number, random_share=random_share,
            on_progress=lambda done, total: deal.screen.advanced("answering", done, total),
        )  # fmt: skip
    return CommandResult(done, _show_selected(done))


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


def _show_selected(done: SelectResult) -> Sequence[RenderableType]:
    shown = [
        f"{done.out}: {done.num_rows} of {done.num_inputs} texts, {done.num_random} of them drawn at random, answered "
        f"by version {done.version} of {done.lineage} as {done.task}."
    ]
    if done.num_known:
        shown.append(f"{done.num_known} texts have feedback or have landed already.")
    if done.num_unusable:
        shown.append(f"{done.num_unusable} rows have no text that can be labelled.")
    fill_in = f"Fill in the column {done.column}"
    if done.data is None:
        shown.append(f"{fill_in}, then give: deal feedback {done.out} --lineage {done.lineage}, and: deal harvest "
                     f"{done.task} --lineage {done.lineage}")  # fmt: skip
    else:
        shown.append(f"{fill_in} and delete the rows that are left empty, then give: deal adapt --task {done.task} "
                     f"--data {done.out} --lineage {done.lineage}")  # fmt: skip
    return [escape(each) for each in shown]


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
