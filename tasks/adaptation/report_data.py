"""What the page of a run is made of, gathered from the registry and the object store."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from itertools import islice
from typing import Any

from infra.report.charts import thin
from infra.report.run_report import BadRow, Link, Origin, Quality, RunReport, Training, Verdict
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.tracking.registry import VersionInfo, open_registry
from tasks.adaptation.changed_answers import MAX_EXAMPLES, compare_answers, cut
from tasks.adaptation.ingest import read_manifest
from tasks.context import current_store, local_file
from tasks.lineage.record import read_record
from tasks.references import DatasetRef, RunRef, TrainSummary, VersionRef

MAX_LOSSES = 1000
"""Kept for the page; MLflow has all of them as a metric."""
LIBRARIES = ("deal-pipeline", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "mlflow", "prefect")


def gather_report(
    run: RunRef,
    version: VersionRef,
    dataset: DatasetRef,
    summary: TrainSummary,
    seconds: Mapping[str, float],
    *,
    verdict: Verdict,
    include_texts: bool,
) -> RunReport:
    """Everything about a registered version that its page shows, beside its evaluation."""
    store = current_store()
    known = {info.version: info for info in open_registry().versions(version.lineage)}
    own = known[version.version]
    parent = known.get(version.parent_version or "")
    return RunReport(
        lineage=version.lineage,
        version=version.version,
        task=dataset.task,
        parent_version=version.parent_version,
        verdict=verdict,
        reasons=version.reasons,
        created=own.created,
        include_texts=include_texts,
        training=_training(own.strategy, summary),
        quality=_quality(store, dataset, include_texts),
        changed=compare_answers(
            store, version.adapter_uri, parent.adapter_uri if parent else None, include_texts=include_texts
        ),
        seconds=dict(seconds),
        lineage_so_far=tuple(_link(info) for info in known.values() if int(info.version) <= int(version.version)),
        origin=Origin(
            base=read_record(store, version.adapter_uri).base.name,
            libraries=library_versions(),
            tracking_id=run.tracking_id,
            run_key=own.run_key,
            base_sha256=own.base_sha256,
            dataset_sha256=own.dataset_sha256,
            adapter_sha256=own.adapter_sha256,
            config_sha256=own.config_sha256,
        ),
    )


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a result, as they are installed here."""
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            continue
    return found


def _training(strategy: str, summary: TrainSummary) -> Training:
    losses = [(step, loss) for step, loss in summary.losses if math.isfinite(loss)]
    return Training(
        strategy=strategy,
        num_steps=summary.num_steps,
        seconds=summary.seconds,
        rows_per_second=summary.rows_per_second,
        resumed_from_step=summary.resumed_from_step,
        losses=tuple(thin(losses, MAX_LOSSES)),
        fill=summary.fill,
    )


def _quality(store: ObjectStore, dataset: DatasetRef, include_texts: bool) -> Quality:
    """What is known of the arrival; of one that was forgotten since, the numbers of its rows."""
    try:
        manifest = read_manifest(store, dataset.uri)
    except ObjectNotFoundError:
        numbers = {"num_train": dataset.num_train, "num_test": dataset.num_test, "num_rejected": dataset.num_rejected}
        return Quality(**numbers, num_read=sum(numbers.values()))
    key = dataset.quarantine
    if key is not None and not store.exists(key):  # forgotten since
        key = None
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
        bad_rows=_bad_rows(store, key, include_texts) if key is not None else (),
    )


def _bad_rows(store: ObjectStore, key: str, include_texts: bool) -> tuple[BadRow, ...]:
    with local_file(store, store.uri_of(key)) as path, path.open(encoding="utf-8") as lines:
        entries = [json.loads(line) for line in islice(lines, MAX_EXAMPLES)]
    return tuple(
        BadRow(
            file=entry["file"],
            row=entry["row"],
            line=entry["line"],
            problems=tuple(_problem(each, include_texts) for each in (entry, *entry.get("more", ()))),
        )
        for entry in entries
    )


def _problem(entry: Mapping[str, Any], include_texts: bool) -> str:
    return cut(f"{entry['reason']}: {entry['value']}") if include_texts else str(entry["reason"])


def _link(info: VersionInfo) -> Link:
    return Link(**{name: getattr(info, name) for name in Link.model_fields})
