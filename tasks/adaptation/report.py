"""Write the report of a run: scores, figures and a page in MLflow, and a shorter page in Prefect."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from deal_core.data.row_warnings import data_warnings
from deal_core.evaluation.report import EvaluationReport
from infra.report import page as words
from infra.report.run_report import (
    EVALUATION_FILE,
    PAGE_FILE,
    REPORT_FILE,
    Quality,
    QuarantinedRow,
    RunReport,
    Training,
)
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.opening import open_store
from infra.tracking.client import installed_version
from infra.versions import Version, Versions
from tasks.adaptation.run import STAGE
from tasks.data_files import local_files
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import MAX_EXAMPLES, compare_answers, cut, read_answers
from tasks.lineage.reports import write_report
from tasks.progress import patient, staged
from tasks.references import DatasetRef, TrainSummary

logger = logging.getLogger(__name__)

MAX_LOSSES = 1000
"""Losses in the report. MLflow has every loss as a metric."""
LIBRARIES = ("deal-pipeline", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "mlflow", "prefect")


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The results of a run, which its report needs."""

    spec: Mapping[str, Any]
    """The spec, as JSON."""
    dataset: DatasetRef
    evaluation: EvaluationReport
    training: TrainSummary


def gather_report(
    store: ObjectStore,
    version: Version,
    base_name: str,
    findings: Findings,
    seconds: Mapping[str, float],
) -> RunReport:
    """Collect what the page of a registered version shows beside the version and its evaluation."""
    dataset, summary, include_texts = findings.dataset, findings.training, findings.spec["data"]["include_texts"]
    parent = Versions(store).find(version.lineage, version.parent_version or "")
    parent_answers = read_answers(store, parent.adapter_uri).now if parent else {}
    facts_of_training = summary.model_dump(include=set(Training.model_fields))
    losses = [(step, loss) for step, loss in summary.losses if math.isfinite(loss)]
    libraries = {"Python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # the checkout is not installed
            libraries[name] = installed_version(name)
    return RunReport(
        include_texts=include_texts,
        training=Training(**facts_of_training | {"losses": thin(losses, MAX_LOSSES)}),
        quality=_quality(store, dataset, include_texts),
        changed=compare_answers(store, version, parent_answers, include_texts=include_texts),
        seconds=dict(seconds),
        base=base_name,
        libraries=libraries,
    )


def thin(points: Sequence[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """Choose at most `limit` points evenly, including the first and the last."""
    if len(points) <= limit:
        return list(points)
    return [points[round(number * (len(points) - 1) / (limit - 1))] for number in range(limit)]


def _quality(store: ObjectStore, dataset: DatasetRef, include_texts: bool) -> Quality:
    """The facts about the arrival. If it was forgotten since, only the numbers of its rows are left."""
    try:
        manifest = read_manifest(store, dataset.uri)
    except ObjectNotFoundError:
        numbers = {"num_train": dataset.num_train, "num_test": dataset.num_test, "num_rejected": dataset.num_rejected}
        return Quality(**numbers, num_read=sum(numbers.values()))
    key = dataset.quarantine
    if key is not None and not store.exists(key):  # forgotten since
        key = None
    entries: list[dict[str, Any]] = []
    if key is not None:
        with local_files(store, store.uri_of(key)) as (file,), file.path.open(encoding="utf-8") as lines:
            entries = [json.loads(line) for line in islice(lines, MAX_EXAMPLES)]
    return Quality(
        source=manifest.source,
        format=manifest.task.format,
        split=manifest.split,
        num_labels=len(manifest.task.labels),
        num_read=manifest.num_read,
        num_train=manifest.num_train,
        num_test=manifest.num_test,
        num_rejected=manifest.num_rejected,
        problems=dict(manifest.problems),
        quarantine=key,
        bad_rows=tuple(
            QuarantinedRow(
                file=entry["file"],
                row=entry["row"],
                line=entry["line"],
                problems=tuple(problem_of(problem, include_texts) for problem in (entry, *entry.get("more", ()))),
            )
            for entry in entries
        ),
        warnings=data_warnings(manifest, include_texts=include_texts),
    )


def problem_of(entry: Mapping[str, Any], include_texts: bool) -> str:
    """Return a problem of a quarantined row in a few words. Without texts, it has no word of the row."""
    shown = entry["value"] if include_texts else entry.get("why")
    return cut(f"{entry['reason']}: {shown}") if shown else str(entry["reason"])


def write_reports(
    store: ObjectStore, version: Version, base_name: str, findings: Findings, seconds: Mapping[str, float]
) -> str:
    """Write the report of a version to the store, and a page of it to Prefect.

    `seconds` is the wall time by stage. The result is the command that shows the report.
    """
    report = findings.evaluation
    collected = gather_report(store, version, base_name, findings, seconds)
    write_report(store, version, EVALUATION_FILE, report.to_json())
    write_report(store, version, REPORT_FILE, collected.model_dump(mode="json"))
    try:
        patient(create_markdown_artifact)(
            key=artifact_key(version.lineage),
            markdown=markdown_of(version, collected, report),
            description=f"Version {version.version} of {version.lineage}: {report.task}",
            _sync=True,  # type: ignore[call-arg]  # the flow is async, and this thread of it is not
        )
    except Exception as error:  # the store has the whole report
        logger.warning("Prefect has no page of version %s of %s: %s", version.version, version.lineage, error)
    return f"deal version show {version.version} --report --lineage {version.lineage}"


@task(name="report", **STAGE)
@staged("report", str)
def report_version(version: Version, base_name: str, findings: Findings, seconds: Mapping[str, float]) -> str:
    """Write the report of a version; see `write_reports`."""
    return write_reports(open_store(), version, base_name, findings, seconds)


def artifact_key(lineage: str) -> str:
    """The key of a lineage's artifacts. Prefect takes small letters, digits and hyphens: other names need a digest."""
    key = re.sub("[^a-z0-9]+", "-", lineage.lower()).strip("-")
    return f"adapt-{key}" if key == lineage else f"adapt-{key}-{hashlib.sha256(lineage.encode()).hexdigest()[:8]}"


def markdown_of(version: Version, report: RunReport, evaluation: EvaluationReport) -> str:
    """Return the short page: verdict, scores, numbers of rows, notes and timings. It has no text of a row."""
    quality = report.quality
    lines = [
        f"# {words.verdict_of(version)}",
        *(f"- {reason}" for reason in (*version.reasons, *version.unsure)),
        "",
        "; ".join(f"{name}: **{value}**" for name, value in words.scores_of(version, report, evaluation)) + ".",
        f"{'Judged against' if evaluation.is_consolidation else 'Continues'} {version.parent}.",
        f"{quality.num_train} training rows, {quality.num_test} test rows, {quality.num_rejected} in quarantine.",
        *(f"Test rows of {task.task}: {task.num_gained} gained, {task.num_lost} lost." for task in report.changed),
        f"{', '.join(f'{name} {words.duration(value)}' for name, value in report.seconds.items())}.",
        "",
        *(f"- {note}" for note in evaluation.notes),
        "",
        f"The whole page: `deal version show {version.version} --report --lineage {version.lineage}`, or `{PAGE_FILE}` "
        "in MLflow.",
    ]
    return "\n".join(lines) + "\n"
