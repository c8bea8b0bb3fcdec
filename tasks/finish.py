"""Finish: what a run that died after it had registered its version left undone is done by the lineage's next run."""

from __future__ import annotations

import json

from deal_core.gate import EvaluationReport
from infra.ledger import Ledger
from infra.registry import Registry, VersionInfo
from infra.tracking import open_tracker
from tasks.ingest import read_manifest
from tasks.notices import announce_version
from tasks.promote import is_overtaken, move_aliases
from tasks.references import DatasetRef, RunRef, TrainSummary, VersionRef
from tasks.report import report_run
from tasks.run import end_run, remove_work
from tasks.services import current_store

FINDINGS_FILE = "findings.json"
"""Beside the adapter: what the report is made of."""


def keep_findings(
    adapter_uri: str, report: EvaluationReport, summary: TrainSummary, *, include_texts: bool = False
) -> None:
    """Keep what a run has found before its version is registered, so that its report can be written after a crash."""
    values = {
        "evaluation": report.to_json(), "training": summary.model_dump(mode="json"), "include_texts": include_texts,
    }  # fmt: skip
    current_store().put_bytes(f"{adapter_uri}/{FINDINGS_FILE}", json.dumps(values, allow_nan=False).encode())


def finish_run(registry: Registry, version: VersionInfo, reference: VersionRef) -> None:
    """Complete the run of a lineage's newest version: promotion, report, end, work folder; nothing if it is complete.

    A version that another one has overtaken is left as it is. Each step can be repeated.
    """
    tracked = open_tracker().run(version.tracking_id)
    is_promoted = not version.accepted or "challenger" in version.aliases
    if is_promoted and tracked.is_finished():
        return
    if not is_promoted:
        if is_overtaken(registry, version):
            return
        move_aliases(registry, Ledger(current_store()), version)
    run = RunRef(lineage=version.lineage, task=version.task, run_key=version.run_key, tracking_id=version.tracking_id)
    _report(run, version, reference)
    end_run(run, "FINISHED")
    remove_work(run)


def _report(run: RunRef, version: VersionInfo, reference: VersionRef) -> None:
    store = current_store()
    key = f"{version.adapter_uri}/{FINDINGS_FILE}"
    if not store.exists(key):  # registered before runs kept them
        return
    findings = json.loads(store.get_bytes(key))
    uri = f"datasets/{version.task}/{version.dataset_sha256}"
    manifest = read_manifest(store, uri)
    dataset = DatasetRef(
        task=version.task,
        uri=uri,
        sha256=version.dataset_sha256,
        num_train=manifest.num_train,
        num_test=manifest.num_test,
        num_rejected=manifest.num_rejected,
    )
    report = EvaluationReport.from_json(findings["evaluation"])
    report_run.fn(
        run, reference, dataset, report, TrainSummary.model_validate(findings["training"]), {},
        include_texts=findings.get("include_texts", False),
    )  # fmt: skip
    announce_version(
        "promoted" if version.accepted else "rejected", reference, task=version.task, evaluation=report,
        tracking_id=version.tracking_id,
    )  # fmt: skip
