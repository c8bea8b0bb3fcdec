"""Resume: the lineage's next run completes a run that died after it had registered its version."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from deal_core.data.reading.lines import sha256_of_input
from deal_core.errors import DataValidationError, StoreError
from deal_core.evaluation.report import EvaluationReport
from deal_core.masking import without_secrets
from infra.store.base import ObjectStore
from infra.store.keys import dataset_folder
from infra.tracking.registry import Registry, VersionInfo
from infra.tracking.tracker import open_tracker
from tasks.adaptation.ingest import drop_training_rows, read_manifest
from tasks.adaptation.promote import complete_version, is_complete, is_overtaken
from tasks.adaptation.report import report_run
from tasks.context import current_store, end_run, local_file, remove_work
from tasks.lineage.version_files import reading_beside
from tasks.notices import announce_version
from tasks.references import Arrival, DatasetRef, RunRef, TrainSummary, VersionRef

logger = logging.getLogger(__name__)

FINDINGS_FILE = "findings.json"
"""Beside the adapter: what the report is made of."""


def keep_findings(
    adapter_uri: str, spec: Mapping[str, Any], dataset: DatasetRef, report: EvaluationReport, summary: TrainSummary
) -> None:
    """Keep what a run was asked and has found before its version is registered.

    So its report can be written after a crash, and the arrival learned again after a rollback.
    """
    values = {
        "spec": spec, "dataset": dataset.model_dump(), "evaluation": report.to_json(),
        "training": summary.model_dump(mode="json"),
    }  # fmt: skip
    current_store().put_bytes(f"{adapter_uri}/{FINDINGS_FILE}", json.dumps(values, allow_nan=False).encode())


def read_spec_of(adapter_uri: str) -> Mapping[str, Any]:
    """The spec of the run that made an adapter.

    Raises:
        StoreError: it was not kept.
    """
    spec = (read_findings(adapter_uri) or {}).get("spec")
    if spec is None:
        address = current_store().uri_of(f"{adapter_uri}/{FINDINGS_FILE}")
        raise StoreError(f"{address} does not say what its run was asked; adapt its file anew with --again.")
    return dict(spec)


def read_findings(adapter_uri: str) -> Mapping[str, Any] | None:
    """What `keep_findings` kept; None: the version was registered before runs kept it.

    Raises:
        StoreError: it is damaged.
    """
    store, key = current_store(), f"{adapter_uri}/{FINDINGS_FILE}"
    if not store.exists(key):
        return None
    with reading_beside(store, adapter_uri, FINDINGS_FILE):
        values = json.loads(store.get_bytes(key))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        return values


def require_same_files(store: ObjectStore, arrival: Arrival, version: VersionInfo) -> tuple[str, ...]:
    """The digests of an arrival's files, which have to be those that a version was trained on.

    Raises:
        DataValidationError: they do, or nothing is there.
    """
    findings = read_findings(version.adapter_uri) or {}
    files = read_manifest(store, dataset_of(store, findings, version).uri).files
    found = []
    for address in filter(None, (arrival.data, arrival.test_data)):
        with local_file(store, address) as path:
            found.append(sha256_of_input(path))
        if files and found[-1] not in files:  # older manifests do not have them
            raise DataValidationError(
                f"{address} is not the file that version {version.version} of '{version.lineage}' was trained on; "
                "land the old file again, or adapt to the new one with deal adapt."
            )
    return tuple(found)


def finish_run(registry: Registry, version: VersionInfo, reference: VersionRef) -> None:
    """Complete the run of a lineage's newest version: promotion, report, notice, end, work folder, training rows.

    Nothing is done if it is complete. A version that another one has overtaken is left as it is. Each step can be
    repeated. The next arrival builds on the promotion alone: of the other steps, what fails is logged, and tried again
    by the next run while the version is the newest.

    Raises:
        RegistryError: the version cannot be promoted.
    """
    if not is_complete(version):
        if is_overtaken(registry, version):
            return
        complete_version(registry, version)
    run = RunRef(lineage=version.lineage, task=version.task, run_key=version.run_key, tracking_id=version.tracking_id)
    with _logging(version, "look whether its MLflow run has ended"):
        if open_tracker().run(run.tracking_id).is_finished():
            return
    status: Literal["FINISHED", "FAILED"] = "FAILED"
    findings = None
    with _logging(version, "write its report"):
        findings = read_findings(version.adapter_uri)
        if findings is not None:
            report_findings(report_run.fn, run, reference, version, findings)
        status = "FINISHED"
    with _logging(version, "announce it"):
        if findings is not None:
            evaluation = EvaluationReport.from_json(findings["evaluation"])
            announce_version(reference, task=version.task, evaluation=evaluation, tracking_id=version.tracking_id)
    with _logging(version, "end its MLflow run"):
        end_run(run, status)
    with _logging(version, "remove its work folder"):
        remove_work(run)
    with _logging(version, "delete its training rows"):
        if findings is not None:
            drop_training_rows(current_store(), dataset_of(current_store(), findings, version).uri)


@contextmanager
def _logging(version: VersionInfo, doing: str) -> Iterator[None]:
    """Log what goes wrong inside, and go on."""
    try:
        yield
    except Exception as error:  # whatever it is: a lineage must not stand still for a page
        reason = without_secrets(str(error).split("\n")[0])
        logger.error(
            "Cannot %s, version %s of '%s': %s: %s; the lineage learns on without.",
            doing, version.version, version.lineage, type(error).__name__, reason,
        )  # fmt: skip


def report_findings(
    write: Callable[..., object], run: RunRef, reference: VersionRef, version: VersionInfo, findings: Mapping[str, Any]
) -> None:
    """Write the report of a version again, from the findings that lie next to its adapter.

    Args:
        write: `report_run`'s function, or `write_report` for the part of it that MLflow keeps.
        run: whose report it is.
        reference: the version.
        version: what the registry knows of the version.
        findings: as `read_findings` returns them.
    """
    write(
        run, reference, dataset_of(current_store(), findings, version),
        EvaluationReport.from_json(findings["evaluation"]), TrainSummary.model_validate(findings["training"]), {},
        include_texts=findings.get("spec", {}).get("data", {}).get("include_texts", False),
    )  # fmt: skip


def dataset_of(store: ObjectStore, findings: Mapping[str, Any], version: VersionInfo) -> DatasetRef:
    """The dataset of a version, also of one trained when lineages still shared what lies under a digest."""
    if "dataset" in findings:
        return DatasetRef.model_validate(findings["dataset"])
    uri = dataset_folder(version.task, version.dataset_sha256)
    manifest = read_manifest(store, uri)
    return DatasetRef(
        task=version.task,
        uri=uri,
        sha256=version.dataset_sha256,
        num_train=manifest.num_train,
        num_test=manifest.num_test,
        num_rejected=manifest.num_rejected,
    )
