"""Register an adapter as a version, with everything that the next arrival and its servers need."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime

from prefect import runtime, task

from deal_core.adapter.files import CONFIG_FILE, PROOF_FILE, as_recorded, digests_of
from deal_core.base_model.sources import licence_of_base, resolve_base
from deal_core.evaluation.gate import GateDecision
from deal_core.evaluation.report import mean_score
from infra.settings import HomeSettings
from infra.store import keys
from infra.store.base import ObjectNotFoundError
from infra.store.opening import open_store
from infra.versions import SCORES, Version, Versions
from tasks.adaptation.report import Findings
from tasks.adaptation.resume import keep_findings
from tasks.adaptation.run import STAGE, AdaptationRun
from tasks.arrival_check import keep_scores
from tasks.lineage.record import RECORD_FILE, LineageRecord, write_record
from tasks.lineage.version_files import CARD_FILE
from tasks.progress import staged
from tasks.references import TrainedAdapter

FIELDS_OF_CHECK = ("kind", "task", "value", "limit")


@task(name="register", **STAGE)
@staged("register", lambda version: f"version {version.version} of {version.lineage}")
def register_version(
    adaptation: AdaptationRun, trained: TrainedAdapter, findings: Findings, decision: GateDecision
) -> Version:
    """Write the version's findings, its record, its model card and what serving needs, and register it.

    Accepted or rejected: a version that its gate rejected is registered too.
    """
    from deal_core.evaluation.answering import SERVED_FILE
    from tasks.lineage.model_card import served_version, write_card

    store, spec, parent, plan = open_store(), adaptation.spec, adaptation.parent, adaptation.consolidation
    report, branch, relearns = findings.evaluation, adaptation.head.branch, adaptation.relearns
    keep_findings(store, trained.uri, findings)
    record = LineageRecord(
        lineage=adaptation.lineage,
        base=adaptation.base,
        strategy=adaptation.strategy,
        adapter=adaptation.adapter,
        tasks=tuple(
            task.with_base_accuracy(report.base_accuracy_on_new_rows) if task.schema.name == report.task else task
            for task in adaptation.tasks
        ),
        matrix=report.matrix,
        slices=tuple(part for part in adaptation.renewal.slices if part.name in report.slices),
    )
    if adaptation.tested is not None:
        keep_scores(store, trained.uri, adaptation.row_scores)
    store.delete(keys.jobs_folder(trained.uri))  # of a try on Ray that was killed; this one may be local
    record_sha256 = write_record(store, trained.uri, record)
    served = json.dumps(served_version(record).to_json(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    (trained.folder / SERVED_FILE).write_text(served, encoding="utf-8")
    files = digests_of(trained.folder) | digests_of(trained.folder, [SERVED_FILE])
    with suppress(ObjectNotFoundError):  # an evaluation by several processes makes no proof
        files[PROOF_FILE] = store.sha256_of(f"{trained.uri}/{PROOF_FILE}")
    version = Version(
        lineage=adaptation.lineage,
        created=datetime.now(UTC),
        kind="adaptation" if plan is None else "consolidation",
        arrivals=() if plan is None else plan.arrivals,
        starts_from_base=plan is not None and plan.start == "base",
        task=adaptation.dataset.task,
        parent_version=parent.version if parent else None,
        run_key=adaptation.run_key,
        flow_run=runtime.flow_run.id,
        strategy=adaptation.strategy,
        base_sha256=adaptation.base.sha256,
        dataset_sha256=adaptation.dataset.sha256,
        landed_sha256=adaptation.dataset.landed_sha256,
        requeued_sha256=relearns.dataset_sha256 if relearns else None,
        branch=branch,
        remakes=relearns.version if relearns and branch is not None else None,
        config_sha256=adaptation.config_sha256,
        adapter_uri=trained.uri,
        adapter_sha256=trained.sha256,
        files_sha256=as_recorded({**files, RECORD_FILE: record_sha256}),
        accepted=decision.accepted,
        reasons=decision.reasons,
        failed_checks=tuple(
            {name: getattr(check, name) for name in FIELDS_OF_CHECK} for check in decision.failed_checks
        ),
        unsure=decision.unsure if decision.accepted else (),
        needs_approval=branch is None
        and (spec.gate.approval == "manual" or (spec.gate.unsure == "approve" and bool(decision.unsure))),
        rollout=spec.gate.rollout_terms if decision.accepted and parent and branch is None else None,
        arrival=adaptation.tested and adaptation.tested.score,
        train_seconds=trained.summary.seconds,
        launch=trained.summary.launch,
        shard=trained.summary.shard,
        accuracies=dict(report.accuracies),
        general={name: mean_score(scores.now) for name, scores in report.general.items()},
        base_divergence=report.base_divergence,
        debts={name: debt.points for name, debt in report.debts.items()},
        **{name: getattr(report.matrix, name) for name in SCORES},
    )
    licence = licence_of_base(adaptation.base.source, resolve_base(adaptation.base.source, HomeSettings().cache_dir))
    config = json.loads((trained.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    card = write_card(record, version, licence, config["task_type"])
    store.put_bytes(f"{trained.uri}/{CARD_FILE}", card.encode())
    store.upload_file(trained.folder / SERVED_FILE, f"{trained.uri}/{SERVED_FILE}")
    return Versions(store).register(version)
