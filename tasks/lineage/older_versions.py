"""Versions of which an earlier release wrote no copy to the store: what promotion log, ledger and reports say of them.

Those that were promoted are found by the promotion log. The others are found only where their reports still lie in the
artifact folder of this machine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from deal_core.errors import DealError
from infra.promotions import Ledger, Move
from infra.report.run_report import RunReport, kept_reports
from infra.settings import TrackingSettings
from infra.store import keys
from infra.store.base import ObjectStore
from infra.tracking.registry import VersionFacts
from infra.version_log import StoredVersion
from tasks.adaptation.resume import read_findings
from tasks.lineage.record import RECORD_FILE, LineageRecord, read_record


def find_older(
    store: ObjectStore, lineage: str, written: Collection[StoredVersion], moves: Sequence[Move]
) -> tuple[list[StoredVersion], list[str]]:
    """The versions that are not among `written`, as far as their facts can be told, and one line for each other one.

    Args:
        store: holds adapters, records, findings and the ledger.
        lineage: whose versions.
        written: versions that need not be found.
        moves: the promotion log.
    """
    reports = {report.origin.run_key[:16]: report for report in kept_reports(TrackingSettings(), lineage)}
    found, problems = [], []
    taken = {stored.version for stored in written}
    for folder in _folders(store, lineage, {stored.facts.adapter_uri for stored in written}):
        short_key = keys.file_name(folder)
        try:
            version = _version_of(store, lineage, folder, reports.get(short_key), moves)
        except DealError as error:
            problems.append(str(error))
            continue
        if version is None or version.version in taken:
            problems.append(
                f"{store.uri_of(folder)} is not registered: neither the promotion log nor a report says which version "
                "it is."
            )
            continue
        taken.add(version.version)
        found.append(version)
    return found, problems


def _folders(store: ObjectStore, lineage: str, known: Collection[str]) -> Iterator[str]:
    """Adapters of runs that came as far as to register a version."""
    for info in store.list(keys.adapters_folder(lineage)):
        folder, _, name = info.key.rpartition("/")
        if name == RECORD_FILE and folder not in known:
            yield folder


def _version_of(
    store: ObjectStore, lineage: str, folder: str, report: RunReport | None, moves: Sequence[Move]
) -> StoredVersion | None:
    record, findings = read_record(store, folder), read_findings(folder) or {}
    if report is not None:
        return _by_report(lineage, folder, report, record, findings)
    return _by_log(store, lineage, folder, record, findings, moves)


def _by_report(
    lineage: str, folder: str, report: RunReport, record: LineageRecord, findings: Mapping[str, Any]
) -> StoredVersion:
    origin = report.origin
    facts = VersionFacts(
        **_shared(folder, record, findings), run_key=origin.run_key, task=report.task,
        dataset_sha256=origin.dataset_sha256, config_sha256=origin.config_sha256, adapter_sha256=origin.adapter_sha256,
        parent_version=report.parent_version, accepted=report.verdict != "rejected", reasons=report.reasons,
        approval="awaiting" if report.verdict == "awaiting-approval" else None,
    )  # fmt: skip
    return StoredVersion(lineage=lineage, version=report.version, created=report.created, facts=facts)


def _by_log(
    store: ObjectStore, lineage: str, folder: str, record: LineageRecord, findings: Mapping[str, Any],
    moves: Sequence[Move],
) -> StoredVersion | None:
    """By the ledger's entry of its dataset and the move that made it champion; None: it was never promoted."""
    if "dataset" not in findings:
        return None
    sha256 = findings["dataset"]["sha256"]
    entry = Ledger(store).find(lineage, sha256)
    if entry is None or entry.run_key[:16] != keys.file_name(folder):
        return None
    move = next((move for move in moves if (move.action, move.version) == ("promoted", entry.version)), None)
    if move is None:
        return None
    facts = VersionFacts(
        **_shared(folder, record, findings), run_key=entry.run_key, task=entry.task, dataset_sha256=sha256,
        config_sha256="", adapter_sha256=findings["training"]["adapter_sha256"], parent_version=move.before,
        accepted=True, reasons=(),
    )  # fmt: skip
    return StoredVersion(lineage=lineage, version=entry.version, created=move.when, facts=facts)


def _shared(folder: str, record: LineageRecord, findings: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that record and findings tell of every version."""
    return {
        "strategy": record.strategy,
        "base_sha256": record.base.sha256,
        "adapter_uri": folder,
        "landed_sha256": findings.get("dataset", {}).get("landed_sha256"),
        "average_accuracy": record.matrix.average_accuracy,
        "forgetting": record.matrix.forgetting,
        "backward_transfer": record.matrix.backward_transfer,
        "forward_transfer": record.matrix.forward_transfer,
    }
