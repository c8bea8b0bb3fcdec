"""Commands about live traffic: monitor, rollout, and people's answers to texts (feedback)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_pipeline.cli.console import percent
from deal_pipeline.cli.render import render, render_facts
from deal_pipeline.cli.session import Column, CommandResult, LineageOption, Reason, Session, command, main_app
from deal_pipeline.cli.version import decided, show_decision

if TYPE_CHECKING:
    from infra.versions import Decision
    from tasks.monitoring.feedback import FeedbackResult
    from tasks.monitoring.harvest import HarvestResult
    from tasks.monitoring.look import MonitorResult
    from tasks.monitoring.rollout import RolloutLook, RolloutStatus
    from tasks.monitoring.select import SelectResult

rollout_app = typer.Typer(help="Watch, finish or abort a version tried on live traffic.", no_args_is_help=True)
feedback_app = typer.Typer(help="Take people's right answers, and turn them into rows.", no_args_is_help=True)


@command(main_app, "starting", "deal monitor", "deal monitor --data answers.jsonl")
def monitor(
    deal: Session,
    lineage: LineageOption = "",
    data: Annotated[
        Path | None,
        Option(
            "--data",
            "-d",
            help="File of answers instead of the prediction log: its columns, or as deal predict --data writes.",
            show_default=False,
        ),
    ] = None,
    new_reference: Annotated[
        bool, Option("--new-reference", help="Compare with the present live rows from now on, not with the test rows.")
    ] = False,
) -> CommandResult[MonitorResult]:
    """Compare live traffic with the test rows: drift, accuracy."""
    outcome = deal.lineage(lineage).monitor(data, new_reference=new_reference)
    return CommandResult(outcome, _show_monitor(outcome))


def _show_monitor(result: MonitorResult) -> Sequence[RenderableType]:
    if result.drift is None:
        return [escape(result.problem or "")]
    drift = result.drift
    tests = [(task, test) for task in drift.tasks for test in task.tests or (None,)]
    shown = render(tests, f"Live traffic of {result.lineage}, version {result.version}")
    shown += [f"  [yellow]•[/] {escape(task.task)}: {task.status}" for task in drift.tasks if task.status != "compared"]
    alarms = [f"{task.task}: {alarm.kind}: {alarm.reason}" for task in drift.tasks for alarm in task.alarms]
    shown += [f"  [red]•[/] {escape(alarm)}" for alarm in alarms] or ["No alarm."]
    shown += [
        escape(
            f"Have some of {task.task}'s texts labelled and learn them: deal feedback sample {task.task} --lineage "
            f"{result.lineage}. If the traffic has changed for good and the answers are right: deal monitor "
            "--new-reference"
        )
        for task in drift.tasks
        if task.alarms
    ]
    accuracies = [
        ({"task": task.task, "accuracy": word}, accuracy)
        for task in drift.tasks
        for word, accuracy in (("measured", task.measured), ("estimated", task.estimated))
        if accuracy is not None
    ]
    shown += render(accuracies, "Accuracy")
    shown.append(f"[dim]An alarm is significant (p < {drift.level:.1e}, for {drift.num_tests} tests) and large.[/]")
    return shown


@command(rollout_app, "looking", "deal rollout status", "deal rollout status --apply", works_without_home=True)
def status(
    deal: Session,
    lineage: LineageOption = "",
    apply: Annotated[
        bool,
        Option(
            "--apply",
            help="Promote or reject the version if the figures say so. A Prefect server does this every five minutes.",
        ),
    ] = False,
) -> CommandResult[RolloutLook]:
    """Compare the version that is tried on live traffic with the champion."""
    versions = deal.lineage(lineage)
    look = versions.rollout(apply=apply, tells=False)
    shown = _show_rollout(look.status)
    if look.decision is None:
        return CommandResult(look, shown)
    return CommandResult(
        look,
        [*shown, *show_decision(look.decision)],
        rejected=look.decision.action == "rejected",
        afterwards=partial(versions.tell, look.decision),
    )


@command(rollout_app, "promoting", "deal rollout finish", 'deal rollout finish --reason "enough was seen"')
def finish(
    deal: Session, lineage: LineageOption = "", reason: Reason = "rollout finished by hand"
) -> CommandResult[Decision]:
    """Make the version that is tried on live traffic the champion, whatever the figures say."""
    versions = deal.lineage(lineage)
    return decided(versions, versions.finish_rollout(why=reason, tells=False))


@command(rollout_app, "rejecting", "deal rollout abort", 'deal rollout abort --reason "complaints"')
def abort(
    deal: Session, lineage: LineageOption = "", reason: Reason = "rollout aborted by hand"
) -> CommandResult[Decision]:
    """Reject the version that is tried on live traffic. It can never become champion."""
    versions = deal.lineage(lineage)
    return decided(versions, versions.abort_rollout(why=reason, tells=False))


def _show_rollout(rollout: RolloutStatus) -> Sequence[RenderableType]:
    if rollout.report is None or rollout.since is None:
        tried = f"No version of {escape(rollout.lineage)} is tried on live traffic."
        return [f"{tried} To try the next one, set gate.rollout with: deal lineage apply SPEC"]
    report = rollout.report
    head = f"Version {rollout.version} of {rollout.lineage}, {report.kind} of version {rollout.champion}"
    title = f"{head}, since {rollout.since.astimezone():%Y-%m-%d %H:%M}"
    shown = [*render_facts(report.champion, report.candidate, title=title), *render(report.differences)]
    if report.num_pairs:
        shown.append(f"Same answer to {percent(report.agreement)} % of {report.num_pairs} rows.")
    counted = "rows with feedback" if report.by_feedback else "answers"
    advice = {"goes on": "It goes on.", "abort": "[red]It has to be aborted.[/]", "finish": "[green]It can finish.[/]"}
    shown.append(f"{report.num_counted} of {report.num_wanted} {counted} count. {advice[report.verdict]}")
    return shown + [f"  [red]•[/] {escape(reason)}" for reason in report.reasons if report.verdict == "abort"]


@command(feedback_app, "reading", "deal feedback sample bank", "deal feedback sample bank --data new.csv --number 100")
def sample(
    deal: Session,
    task: Annotated[str, Argument(help="Task whose texts are chosen.")],
    lineage: LineageOption = "",
    number: Annotated[int, Option("--number", "-n", min=1, help="Most texts in the file.")] = 50,
    random_share: Annotated[float, Option(max=1.0, help="Share that is drawn at random, above 0.")] = 0.25,
    data: Annotated[
        Path | None,
        Option(
            "--data",
            "-d",
            help="File of texts that the champion answers first: CSV, JSON lines or Parquet.",
            show_default="the prediction log",
        ),
    ] = None,
    column: Column = None,
    out: Annotated[
        Path | None, Option("--out", "-o", help="New .csv or .jsonl file.", show_default="TASK-to-label.csv")
    ] = None,
) -> CommandResult[SelectResult]:
    """Write a file of texts that are worth labelling: the least certain answers, and a random share."""
    if column is not None and data is None:
        raise ConfigError("--column goes with --data; give both, or neither.")
    done = deal.lineage(lineage).sample_feedback(
        task,
        data=data,
        column=column,
        out=out,
        number=number,
        random_share=random_share,
        on_progress=lambda done, total: deal.screen.advanced("answering", done, total),
    )
    return CommandResult(done, _show_selected(done))


@command(
    feedback_app, "reading", "deal feedback add bank-to-label.csv", "deal feedback add checked.parquet --lineage bank"
)
def add(
    deal: Session,
    file: Annotated[Path, Argument(help="CSV, JSON lines or Parquet with id, and label, answer or is_right.")],
    lineage: LineageOption = "",
) -> CommandResult[FeedbackResult]:
    """Take right answers to logged requests, from a file that a person has checked."""
    taken = deal.lineage(lineage).add_feedback(file)
    shown = [f"Feedback on {taken.num_taken} answers was taken."]
    if taken.num_blank:
        shown.append(f"{taken.num_blank} rows have no feedback.")
    if taken.num_unknown:
        shown.append(f"The log does not have {taken.num_unknown} of the answers; feedback on them cannot be learned.")
    return CommandResult(taken, [*map(escape, shown)])


@command(feedback_app, "reading", "deal feedback export bank", "deal feedback export bank --lineage support")
def export(
    deal: Session,
    task: Annotated[str, Argument(help="Task whose reviewed answers land in its inbox.")],
    lineage: LineageOption = "",
) -> CommandResult[HarvestResult]:
    """Write reviewed right answers into the inbox, as an ordinary file. Each lands once."""
    done = deal.lineage(lineage).export_feedback(task)
    shown = [f"{done.num_rows} rows landed as {done.key}." if done.key else "There is nothing to export."]
    shown += [f"  not exported: {number}, {reason}" for reason, number in done.skipped.items()]
    return CommandResult(done, [*map(escape, shown)])


def _show_selected(done: SelectResult) -> Sequence[RenderableType]:
    shown = [
        f"{done.out}: {done.num_rows} of {done.num_inputs} texts, {done.num_random} of them drawn at random, answered "
        f"by version {done.version} of {done.lineage} as {done.task}."
    ]
    if done.num_known:
        shown.append(f"{done.num_known} texts have feedback or have landed already.")
    if done.num_unusable:
        shown.append(f"{done.num_unusable} rows have no text that can be labelled.")
    fill_in, file = f"Fill in the column {done.column}", shlex.quote(done.out)
    if done.data is None:
        shown.append(
            f"{fill_in}, then give: deal feedback add {file} --lineage {done.lineage}, and: deal feedback "
            f"export {done.task} --lineage {done.lineage}"
        )
    else:
        shown.append(
            f"{fill_in} and delete the rows that are left empty, then give: deal adapt --task {done.task} "
            f"--data {file} --lineage {done.lineage}"
        )
    return [escape(line) for line in shown]
