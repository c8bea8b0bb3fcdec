"""Find the parent of a run, and complete a run that died after it had registered its version."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prefect import task

from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.source_files import digests_of
from deal_core.errors import ConfigError, DataValidationError, StoreError
from deal_core.evaluation.report import EvaluationReport
from deal_core.safe_text import without_secrets
from infra.branches import Branches, Head, tip_of
from infra.run_journal import RunJournal
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions, require_adapter
from tasks.adaptation.promote import is_open, is_overtaken, promote_accepted
from tasks.adaptation.report import Findings, write_reports
from tasks.adaptation.run import STAGE, remove_work
from tasks.data_files import local_files
from tasks.lineage.branch import require_no_branch
from tasks.lineage.choices import changed_settings
from tasks.lineage.datasets import drop_training_rows, read_manifest
from tasks.lineage.record import read_record
from tasks.lineage.tombstones import refuse_forgotten
from tasks.lineage.version_files import reading_beside
from tasks.mlflow_mirror import sync_lineage
from tasks.notices import announce_version
from tasks.progress import staged
from tasks.references import DatasetRef, TrainSummary
from tasks.spec import AdaptSpec, TaskSpec, parse

logger = logging.getLogger(__name__)

FINDINGS_FILE = "findings.json"
"""A file next to the adapter with everything that a report needs."""


@task(name="parent", **STAGE)
@staged("parent")
def find_parent(head: Head) -> Version | None:
    """Return the version that the next one continues: the champion, or the newest of a branch; None: the base model.

    Before that, the newest version's run is completed if a crash interrupted it. So no accepted version is skipped.
    Then MLflow gets what it lacks, and a person's move of the alias there counts.

    Raises:
        BranchOpenError: The lineage has an open branch, and the head is the champion.
    """
    store, lineage = open_store(), head.lineage
    if head.branch is None:
        require_no_branch(store, lineage)
    finish_newest(store, lineage)
    sync_lineage(store, lineage)  # after an interrupted run has its report
    if head.branch is None:
        return Versions(store).champion(lineage)
    branch = Branches(store).open(lineage)
    assert branch is not None and branch.number == head.branch, "a branch grows while it is open"
    return tip_of(branch, Versions(store).all(lineage))


def finish_newest(store: ObjectStore, lineage: str) -> None:
    """Complete the run of the lineage's newest version, if a crash interrupted it."""
    if registered := Versions(store).all(lineage):
        _finish_run(store, registered[-1])


def keep_findings(store: ObjectStore, adapter_uri: str, findings: Findings) -> None:
    """Store the results of a run before its version is registered.

    With them, the report can be written after a crash, and the arrival can be learned again after a rollback.
    """
    values = {
        "spec": findings.spec,
        "dataset": findings.dataset.model_dump(),
        "evaluation": findings.evaluation.to_json(),
        "training": findings.training.model_dump(mode="json"),
    }
    store.put_bytes(f"{adapter_uri}/{FINDINGS_FILE}", json.dumps(values, allow_nan=False).encode())


def changed_since(store: ObjectStore, parent: Version, spec: AdaptSpec) -> tuple[str, ...]:
    """Return a note about settings that differ from the parent's; none if the parent's spec is lost."""
    try:
        before = read_findings(store, parent.adapter_uri).spec
    except StoreError:
        return ()
    return changed_settings(spec, before, parent.version)


def read_findings(store: ObjectStore, adapter_uri: str) -> Findings:
    """Read what `keep_findings` has stored."""
    with reading_beside(store, adapter_uri, FINDINGS_FILE):
        values = json.loads(store.get_bytes(f"{adapter_uri}/{FINDINGS_FILE}"))
        return Findings(
            evaluation=EvaluationReport.from_json(values["evaluation"]),
            spec=dict(values["spec"]),
            dataset=DatasetRef.model_validate(values["dataset"]),
            training=TrainSummary.model_validate(values["training"]),
        )


def require_same_files(store: ObjectStore, arrival: TaskSpec, version: Version) -> tuple[str, ...]:
    """Return the digests of an arrival's files. They must be the files that a version was trained on.

    Raises:
        DataValidationError: A file has another content.
        StoreError: A file is missing.
    """
    learned = read_manifest(store, read_findings(store, version.adapter_uri).dataset.uri).files
    with local_files(store, arrival.data) as sources, local_files(store, arrival.test_data or ()) as tests:
        for file in (*sources, *tests):
            if sha256_of_input(file.path) not in learned:
                raise DataValidationError(
                    f"{file.name} is not a file that version {version.version} of '{version.lineage}' was trained on; "
                    "land the old file again, or adapt to the new one with deal adapt."
                )
        return digests_of((*sources, *tests))


def spec_to_relearn(store: ObjectStore, version: Version) -> tuple[AdaptSpec, tuple[str, ...]]:
    """Return the spec of a version's run and the digests of its files, after checking that they can be learned again.

    Raises:
        DataValidationError: A file was replaced by another.
        ForgottenRowsError: Rows of the arrival were forgotten.
        RegistryError: Nothing is left of the version but its entry.
        StoreError: A file is gone.
    """
    if version.is_consolidation:
        raise ConfigError(
            f"Version {version.version} of '{version.lineage}' is a consolidation, which has no arrival of its own; "
            f"consolidate again with: deal lineage consolidate {version.lineage}"
        )
    refuse_forgotten(store, version.task, [version.dataset_sha256])
    if not store.exists(f"{version.adapter_uri}/{FINDINGS_FILE}"):
        require_adapter(version)
    spec = parse(AdaptSpec, read_findings(store, version.adapter_uri).spec, f"version {version.version}")
    files = require_same_files(store, spec.task, version)
    refuse_forgotten(store, version.task, files)
    return spec, files


def _finish_run(store: ObjectStore, version: Version) -> None:
    """Complete the run of a lineage's newest version: promotion, report, work folder, notice, training rows, end.

    A complete run and a version that another version has overtaken stay as they are. Each step can be repeated. Only
    the promotion matters for the next arrival. A failure of another step is logged, and the next run tries it again.
    """
    if is_open(version):
        if is_overtaken(store, version):
            return
        promote_accepted(store, version)
        version = Versions(store).find(version.lineage, version.version) or version
    run = None
    with _logging(version, "read its journal"):
        run = RunJournal(store).find(version.lineage, version.run_key)
    if run is None or run.state == "finished":
        return
    state: Literal["finished", "failed"] = "failed"
    findings = None
    with _logging(version, "write its report"):
        findings = read_findings(store, version.adapter_uri)
        write_reports(store, version, read_record(store, version).base.name, findings, {})
        state = "finished"
    with _logging(version, "remove its work folder"):
        remove_work(run)
    if findings is not None:
        with _logging(version, "announce it"):
            announce_version(version, evaluation=findings.evaluation)
        with _logging(version, "delete its training rows"):
            drop_training_rows(store, findings.dataset.uri)
    with _logging(version, "end its run"):
        RunJournal(store).end(run, state)


@contextmanager
def _logging(version: Version, doing: str) -> Iterator[None]:
    """Log an error of the block instead of raising it."""
    try:
        yield
    except Exception as error:  # a report or a notice must not stop the lineage
        reason = without_secrets(str(error).split("\n")[0])
        logger.error(
            "Cannot %s, version %s of '%s': %s: %s; the lineage continues without it.",
            doing,
            version.version,
            version.lineage,
            type(error).__name__,
            reason,
        )
