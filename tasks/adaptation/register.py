"""Register an adapter as a version, with everything that the next arrival needs."""

from __future__ import annotations

import json
from pathlib import Path

from prefect import runtime

from deal_core.adapter.files import CONFIG_FILE
from deal_core.base_model.sources import licence_of_base, resolve_base
from deal_core.evaluation.gate import GateDecision
from deal_core.evaluation.report import EvaluationReport
from infra.settings import HomeSettings
from infra.tracking.facts import VersionFacts
from infra.tracking.registry import open_registry
from infra.tracking.tracker import open_tracker
from infra.version_log import VersionLog
from tasks.adaptation.ingest import tasks_after
from tasks.context import current_store
from tasks.lineage.history import version_ref
from tasks.lineage.record import LineageRecord, read_record, scores_of, write_record
from tasks.lineage.requests import find_renewal
from tasks.lineage.version_files import borrowed_adapter
from tasks.references import AdaptationJob, RunRef, TrainedAdapter, VersionRef
from tasks.spec import AdaptSpec

VETO_FIELDS = ("kind", "task", "value", "limit")


def register_version(
    job: AdaptationJob, spec: AdaptSpec, trained: TrainedAdapter, report: EvaluationReport, decision: GateDecision
) -> VersionRef:
    """Write the version's record, and register the version, accepted or rejected."""
    store, adapter = current_store(), trained.adapter
    run, base, dataset = job.run, job.base, job.dataset
    before = read_record(store, job.parent.adapter_uri) if job.parent else None
    renewal = find_renewal(store, before, dataset)
    is_judged = renewal.new_slice is None or renewal.new_slice in report.slices  # not asked for after the evaluation
    known = tasks_after(
        store,
        before,
        dataset,
        renewal.known if is_judged else None,
        spec.train.max_prompt_tokens,
        spec.evaluate.max_new_tokens,
    )
    record = LineageRecord(
        lineage=run.lineage,
        base=base,
        strategy=job.strategy,
        adapter=job.adapter,
        tasks=known,
        matrix=report.matrix,
        slices=tuple(each for each in renewal.slices if each.name in report.slices),
        memory=spec.memory,
        spared=job.spared,
    )
    write_record(store, adapter.uri, record)
    facts = VersionFacts(
        run_key=run.run_key,
        task=dataset.task,
        strategy=job.strategy,
        base_sha256=base.sha256,
        dataset_sha256=dataset.sha256,
        landed_sha256=dataset.landed_sha256,
        config_sha256=job.config_sha256,
        adapter_uri=adapter.uri,
        adapter_sha256=adapter.sha256,
        files_sha256=adapter.files_sha256,
        parent_version=adapter.parent_version,
        accepted=decision.accepted,
        reasons=decision.reasons,
        vetoes=tuple({name: getattr(veto, name) for name in VETO_FIELDS} for veto in decision.vetoes),
        approval="awaiting" if decision.accepted and spec.gate.approval == "person" else None,
        flow_run=runtime.flow_run.id,
        rollout=spec.gate.rollout_terms if decision.accepted and adapter.parent_version else None,
        arrival_accuracy=None if job.tested is None else job.tested.accuracy,
        train_seconds=trained.summary.seconds,
        **scores_of(report.matrix),
    )
    with borrowed_adapter(store, adapter, with_method=True) as folder:
        model_id = log_adapter(run, dataset.task, folder, record, facts)
    registered = open_registry().register(run.lineage, facts, tracking_id=run.tracking_id, model_id=model_id)
    VersionLog(store).keep(registered)
    return version_ref(registered)


def log_adapter(run: RunRef, task_name: str, folder: Path, record: LineageRecord, facts: VersionFacts) -> str:
    """Log a copy of the adapter's folder as a model that MLflow can serve; return the model's id."""
    from deal_core.evaluation.answering import SERVED_FILE
    from infra.served_model import write_served_folder
    from tasks.adaptation.model_card import example_rows, served_version, write_card

    base_folder = resolve_base(record.base.source, HomeSettings().cache_dir)
    model = folder.with_name("model")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    licence = licence_of_base(record.base.source, base_folder)
    write_served_folder(
        folder,
        model,
        card=write_card(record, facts, licence, config["task_type"]),
        served=served_version(record).to_json(),
        served_file=SERVED_FILE,
        example=example_rows(record),
        run_id=run.tracking_id,
    )
    tracked = open_tracker().run(run.tracking_id)
    return tracked.log_adapter(model, f"{run.lineage}-{task_name}", sha256=facts.adapter_sha256)
