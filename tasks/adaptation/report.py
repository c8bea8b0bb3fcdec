"""Report: what a run found, as figures, scores and a page in MLflow, and as a shorter page in Prefect."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from deal_core.evaluation.report import EvaluationReport
from infra.report import formatting as words
from infra.report.figures import accuracy_heatmap, accuracy_over_versions, fill_bars, loss_curve
from infra.report.page import matrix_rows, render_page
from infra.report.run_report import PAGE_FILE, REPORT_FILE, RunReport
from infra.tracking.tracking import TrackedRun, open_tracker
from tasks.adaptation.report_data import gather_report
from tasks.patience import patient
from tasks.references import DatasetRef, RunRef, TrainSummary, VersionRef

EVALUATION_FILE = "evaluation.json"
NEWEST = 30
"""Versions in the matrix of the Markdown page, which Prefect's database keeps one of for each run."""


@task(name="report", cache_policy=NO_CACHE)
def report_run(
    run: RunRef,
    version: VersionRef,
    dataset: DatasetRef,
    report: EvaluationReport,
    summary: TrainSummary,
    seconds: Mapping[str, float],
    *,
    include_texts: bool = False,
) -> None:
    """Complete the MLflow run and write the run's page.

    Args:
        run: whose page it is.
        version: what the run has registered.
        dataset: what it learned from.
        report: what it was judged by.
        summary: how it was trained.
        seconds: wall time of the stages so far.
        include_texts: show texts of rows.
    """
    found = write_report(run, version, dataset, report, summary, seconds, include_texts=include_texts)
    patient(create_markdown_artifact)(
        key=re.sub("[^a-z0-9]+", "-", f"adapt-{run.lineage}".lower()).strip("-"),
        markdown=markdown_of(found, report),
        description=f"Version {version.version} of {run.lineage}: {report.task}",
    )


def write_report(
    run: RunRef,
    version: VersionRef,
    dataset: DatasetRef,
    report: EvaluationReport,
    summary: TrainSummary,
    seconds: Mapping[str, float],
    *,
    include_texts: bool,
) -> RunReport:
    """The part of `report_run` that MLflow keeps; the arguments are the same."""
    tracked = open_tracker().run(run.tracking_id)
    log_scores(tracked, report)
    num_landed = dataset.num_train + dataset.num_test + dataset.num_rejected
    num_rows = {"ingest": num_landed, "evaluate": sum(report.num_rows.values())}
    for stage, duration in seconds.items():
        tracked.log_stage(stage, duration, num_rows.get(stage))
    tracked.log_metrics({"rows_per_second/train": summary.rows_per_second})
    found = gather_report(
        run, version, dataset, summary, seconds, verdict=version.outcome, include_texts=include_texts
    )
    tracked.log_json(EVALUATION_FILE, report.to_json())
    tracked.log_json(REPORT_FILE, found.model_dump(mode="json"))
    tracked.log_text(PAGE_FILE, render_page(found, report))
    for name, figure in (
        ("accuracy_matrix", accuracy_heatmap(report.matrix)),
        ("accuracy_over_versions", accuracy_over_versions(report.matrix)),
        ("adapter_fill", fill_bars(summary.fill)),
        ("loss", loss_curve(summary.losses)),
    ):
        tracked.log_figure(name, figure)
    tracked.set_tags({"deal.version": version.version, "deal.gate": "accepted" if version.accepted else "rejected"})
    return found


def read_page(tracking_id: str) -> tuple[RunReport, str]:
    """A run's page, written again from what MLflow keeps.

    Raises:
        RegistryError: the run keeps nothing to write it from, or MLflow does not answer.
    """
    tracked = open_tracker().run(tracking_id)
    report = RunReport.from_json(tracked.read_json(REPORT_FILE))
    return report, render_page(report, EvaluationReport.from_json(tracked.read_json(EVALUATION_FILE)))


def log_scores(tracked: TrackedRun, report: EvaluationReport) -> None:
    """The version's scores as metrics; undefined ones are left out."""
    matrix = report.matrix
    tracked.log_metrics(
        {
            "average_accuracy": matrix.average_accuracy,
            "forgetting": matrix.forgetting,
            "backward_transfer": matrix.backward_transfer,
            "forward_transfer": matrix.forward_transfer,
            "base_accuracy": report.base_accuracy,
            "parent_accuracy_new_task": report.parent_accuracy_new_task,
            **{f"accuracy/{name}": value for name, value in report.accuracies.items()},
            **{f"forgetting/{name}": value for name, value in matrix.forgetting_by_task.items()},
        }
    )


def markdown_of(report: RunReport, evaluation: EvaluationReport) -> str:
    """The heart of the page in Markdown: verdict, matrix, what was gained and lost, timings. No text of any row."""
    matrix = evaluation.matrix
    versions = words.versions_of(report, evaluation)
    base, *learned = matrix_rows(matrix, versions)
    num_older = max(len(learned) - NEWEST, 0)
    left_out = f"{words.count(num_older, 'older version')} left out here; the whole page has all."
    rows = [
        [f"{row.name} {row.trained}".strip(), *(f"**{cell.text}**" if cell.is_trained else cell.text
                                                for cell in row.cells)]
        for row in (base, *learned[num_older:])
    ]  # fmt: skip
    changed = [[each.task, f"+{each.num_gained}", f"−{each.num_lost}", str(each.num_rows)] for each in report.changed]
    stages = [[name, words.duration(value)] for name, value in report.seconds.items()]
    quality = report.quality
    lines = [
        f"# {words.verdict_of(report)}",
        *(f"- {reason}" for reason in report.reasons),
        "",
        "; ".join(f"{name}: **{value}**" for name, value in words.scores_of(report, evaluation)) + ".",
        f"Continues {words.origin_of(report)}.",
        f"{quality.num_train} training rows, {quality.num_test} test rows, {quality.num_rejected} in quarantine.",
        "",
        *words.markdown_table(["after learning, %", *matrix.tasks], rows), "",
        *([left_out, ""] if num_older else ()),
        *(f"- {note}" for note in evaluation.notes),
        "",
        *([*words.markdown_table(["test rows", "gained", "lost", "of"], changed), ""] if changed else ()),
        *words.markdown_table(["stage", "time"], stages),
        "",
        f"The whole page: `{PAGE_FILE}` of the MLflow run {report.origin.tracking_id}, or "
        f"`deal report {report.version} --lineage {report.lineage}`.",
    ]
    return "\n".join(lines) + "\n"
