"""Register: an evaluated adapter becomes one version of its lineage, with all that the next arrival must know."""

from __future__ import annotations

import json
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import AdapterConfig, Approval
from deal_core.evaluation import EvaluationReport
from deal_core.gate import GateDecision
from infra.registry import VersionFacts, open_registry
from infra.tracking import open_tracker
from tasks.answers import ANSWERS_FILE
from tasks.evaluate import renewed_task
from tasks.ingest import read_manifest
from tasks.lineage import version_ref
from tasks.record import KnownTask, LineageRecord, read_record, write_record
from tasks.references import AdapterRef, BaseRef, DatasetRef, RunRef, VersionRef
from tasks.services import borrowed_folder, current_store

VETO_FIELDS = ("kind", "task", "value", "limit")


def leave_rows_out(folder: Path) -> None:
    """Take out of a copy for MLflow what rows could be read from; the store, which has the rows too, keeps it.

    These are the answers, and the method's tensors where they hold old rows (as tokens). What is left is the whole
    product: the adapter.
    """
    from deal_core.adapter.state import METHOD_JSON, METHOD_TENSORS

    (folder / ANSWERS_FILE).unlink(missing_ok=True)
    if json.loads((folder / METHOD_JSON).read_text(encoding="utf-8"))["stores"] == "data":
        (folder / METHOD_TENSORS).unlink(missing_ok=True)


@task(name="register", cache_policy=NO_CACHE)
def register_version(
    run: RunRef,
    base: BaseRef,
    parent: VersionRef | None,
    dataset: DatasetRef,
    adapter: AdapterRef,
    report: EvaluationReport,
    decision: GateDecision,
    strategy: str,
    config: AdapterConfig,
    config_sha256: str,
    max_prompt_tokens: int,
    max_new_tokens: int,
    approval: Approval,
) -> VersionRef:
    """Write the version's record beside its adapter and register both, accepted or rejected."""
    store = current_store()
    before = read_record(store, parent.adapter_uri) if parent else None
    known = before.tasks if before else ()
    if before is None or before.task(dataset.task) is None:
        schema = read_manifest(store, dataset.uri).task
        new = KnownTask(
            schema=schema, dataset_uri=dataset.uri, num_test=dataset.num_test, max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        known = (*known, new)
    elif renewed := renewed_task(store, before, dataset):
        known = tuple(task.judged_by(dataset) if task == renewed else task for task in known)
    record = LineageRecord(
        lineage=run.lineage,
        base=base,
        strategy=strategy,
        adapter=config,
        tasks=known,
        matrix=report.matrix,
    )
    write_record(store, adapter.uri, record)
    facts = VersionFacts(
        run_key=run.run_key,
        task=dataset.task,
        strategy=strategy,
        base_sha256=base.sha256,
        dataset_sha256=dataset.sha256,
        config_sha256=config_sha256,
        adapter_uri=adapter.uri,
        adapter_sha256=adapter.sha256,
        parent_version=adapter.parent_version,
        accepted=decision.accepted,
        reasons=decision.reasons,
        vetoes=tuple({name: getattr(veto, name) for name in VETO_FIELDS} for veto in decision.vetoes),
        approval="awaiting" if decision.accepted and approval == "person" else None,
        average_accuracy=report.matrix.average_accuracy,
        forgetting=report.matrix.forgetting,
        backward_transfer=report.matrix.backward_transfer,
        forward_transfer=report.matrix.forward_transfer,
    )
    with borrowed_folder(store, adapter.uri) as folder:
        leave_rows_out(folder)
        model_id = open_tracker().run(run.tracking_id).log_adapter(folder, f"{run.lineage}-{dataset.task}")
    return version_ref(
        open_registry().register(run.lineage, facts, tracking_id=run.tracking_id, model_id=model_id)
    )
