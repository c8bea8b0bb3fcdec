"""Report: what a run found, as figures and scores in MLflow and as a page in Prefect."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from deal_core.evaluation import EvaluationReport
from infra.report.figures import accuracy_heatmap, accuracy_over_versions, fill_bars, loss_curve
from infra.tracking import TrackedRun, open_tracker
from tasks.patience import patient
from tasks.references import DatasetRef, RunRef, TrainSummary, VersionRef


@task(name="report", cache_policy=NO_CACHE)
def report_run(
    run: RunRef,
    version: VersionRef,
    dataset: DatasetRef,
    report: EvaluationReport,
    summary: TrainSummary,
    seconds: Mapping[str, float],
) -> None:
    """Complete the MLflow run and write the run's page."""
    tracked = open_tracker().run(run.tracking_id)
    log_scores(tracked, report)
    num_landed = dataset.num_train + dataset.num_test + dataset.num_rejected
    num_rows = {"ingest": num_landed, "evaluate": sum(report.num_rows.values())}
    for stage, duration in seconds.items():
        tracked.log_stage(stage, duration, num_rows.get(stage))
    tracked.log_metrics({"rows_per_second/train": summary.rows_per_second})
    tracked.log_json("evaluation.json", report.to_json())
    for name, figure in (
        ("accuracy_matrix", accuracy_heatmap(report.matrix)),
        ("accuracy_over_versions", accuracy_over_versions(report.matrix)),
        ("adapter_fill", fill_bars(summary.fill)),
        ("loss", loss_curve(summary.losses)),
    ):
        tracked.log_figure(name, figure)
    tracked.set_tags({"deal.version": version.version, "deal.gate": "accepted" if version.accepted else "rejected"})
    patient(create_markdown_artifact)(
        key=re.sub("[^a-z0-9]+", "-", f"adapt-{run.lineage}".lower()).strip("-"),
        markdown=page(version, dataset, report, seconds),
        description=f"Version {version.version} of {run.lineage}: {report.task}",
    )


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


def page(
    version: VersionRef, dataset: DatasetRef, report: EvaluationReport, seconds: Mapping[str, float]
) -> str:
    """The run in Markdown."""
    verdict = "accepted" if version.accepted else "rejected: " + " ".join(version.reasons)
    parent = f"version {version.parent_version}" if version.parent_version else "the base model"
    matrix = report.matrix
    header = ["after learning", *matrix.tasks]
    rows = [["(base model)", *map(_percent, matrix.base)]]
    rows += [[name, *map(_percent, row)] for name, row in zip(matrix.trained, matrix.rows, strict=True)]
    lines = [
        f"# {version.lineage}, version {version.version}: {report.task}",
        f"Continues {parent}. Gate: **{verdict}**",
        f"{dataset.num_train} training rows, {dataset.num_test} test rows, {dataset.num_rejected} in quarantine.",
        "",
        _row(header),
        _row(["---"] * len(header)),
        *map(_row, rows),
        "",
        f"AA {_percent(matrix.average_accuracy)}, forgetting {_percent(matrix.forgetting)}, "
        f"BWT {_percent(matrix.backward_transfer)}, FWT {_percent(matrix.forward_transfer)}",
        "",
        *(f"- {note}" for note in report.notes),
        "",
        _row(["stage", "seconds"]),
        _row(["---", "---"]),
        *(_row([stage, f"{duration:.1f}"]) for stage, duration in seconds.items()),
    ]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
