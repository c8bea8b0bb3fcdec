"""Adapt: one arrival becomes the next version of a lineage, and its champion if it passes the gate.

Example:
    >>> result = asyncio.run(adapt(read_spec(Path("examples/bank/spec.yaml"))))  # doctest: +SKIP
    >>> result.status  # doctest: +SKIP
    'promoted'
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from prefect import flow

from deal_core.printable import listed
from flows.lock import hold_lineage
from flows.results import AdaptResult, adapted, repeated
from infra.disk import disk_full
from tasks.adaptation.evaluate import evaluate_version
from tasks.adaptation.ingest import drop_training_rows, ingest_arrival
from tasks.adaptation.promote import promote_version
from tasks.adaptation.register import decide_gate, register_version
from tasks.adaptation.report import report_run
from tasks.adaptation.resume import find_parent, keep_findings
from tasks.adaptation.train import train_version
from tasks.base import identify_base, refuse_what_cannot_fit
from tasks.context import current_store, end_run, fail_run, remove_work, start_run
from tasks.lineage.record import read_record, require_same_base
from tasks.lineage.settings import AskedSpec, arrival_of, choose_adapter, choose_base, choose_strategy, settings_of
from tasks.lineage.versions import count_attempts, find_own, find_registered, find_repeat, make_run_key
from tasks.notices import announce_failure, announce_version
from tasks.progress import Interrupted, Stages, reporter
from tasks.references import AdaptationJob, DatasetRef, TrainSummary
from tasks.spec import AdaptSpec


@flow(name="adapt", flow_run_name="adapt-{spec.lineage}-{spec.task.name}")
async def adapt(spec: AskedSpec, again: bool = False) -> AdaptResult:
    """Learn one arrival.

    Args:
        spec: the arrival, the lineage, and how it learns.
        again: train even if the lineage has learned from this arrival, but not twice in one run.

    Raises:
        ConfigError: the spec contradicts the lineage.
        DataValidationError: the file is refused whole.
    """
    async with hold_lineage(spec.lineage):
        return await learn_arrival(spec, again)


@flow(name="adapt-arrival", flow_run_name="adapt-{spec.lineage}-{spec.task.name}")
async def adapt_held(spec: AdaptSpec) -> AdaptResult:
    """Learn one arrival for a caller that holds the lineage; otherwise as `adapt`."""
    return await learn_arrival(spec, again=False)


async def learn_arrival(spec: AdaptSpec, again: bool) -> AdaptResult:
    """Learn an arrival, and tell whoever wants to know if that fails; nobody else may work on the lineage meanwhile."""
    try:
        return await _learn_arrival(spec, again)
    except Interrupted:
        raise
    except Exception as error:
        full = disk_full(error)
        await asyncio.to_thread(announce_failure, spec.lineage, spec.task.name, full or error)
        if full is not None and full is not error:
            raise full from error
        raise


async def _learn_arrival(spec: AdaptSpec, again: bool) -> AdaptResult:
    """The stages of an adaptation."""
    stages = Stages()
    parent = await stages.run("parent", find_parent, spec.lineage)
    record = read_record(current_store(), parent.adapter_uri) if parent else None
    adapter, strategy = choose_adapter(spec, record), choose_strategy(spec, record)
    dataset = await stages.run("ingest", ingest_arrival, arrival_of(spec), spec.data, parent, spec.lineage, again)
    stages.done("ingest", describe(dataset))
    if known := await stages.run("repeat", find_own if again else find_repeat, dataset, spec.lineage):
        drop_training_rows(current_store(), dataset.uri)
        return repeated(known, dataset)
    source, num_versions = choose_base(spec, record), len(record.matrix.trained) if record else 0
    await asyncio.to_thread(
        refuse_what_cannot_fit, source, adapter, strategy, spec.method, spec.train, num_versions=num_versions
    )
    base = await stages.run("base", identify_base, source, spec.train.quantize)
    stages.done("base", base.name)
    if record:
        require_same_base(record, base)
    config_sha256 = spec.config_sha256(adapter, strategy)
    attempt = 0
    if again:
        attempt = await stages.run("repeat", count_attempts, spec.lineage, dataset)
    run_key = make_run_key(
        lineage=spec.lineage,
        base=base,
        dataset=dataset,
        parent=parent,
        config_sha256=config_sha256,
        attempt=attempt,
    )
    if known := await stages.run("repeat", find_registered, run_key):
        drop_training_rows(current_store(), dataset.uri)
        return repeated(known, dataset)
    params = {**settings_of(spec, adapter, strategy), "attempt": attempt}
    run = await stages.run("start", start_run, run_key, base, parent, dataset, spec.lineage, params)
    try:
        job = AdaptationJob(
            run=run, base=base, parent=parent, dataset=dataset, adapter=adapter, strategy=strategy,
            config_sha256=config_sha256,
        )  # fmt: skip
        result = await _learn(spec, job, stages)
    except BaseException:
        fail_run(run)
        raise
    end_run(run, "FINISHED")
    remove_work(run)
    drop_training_rows(current_store(), dataset.uri)
    return result


async def _learn(spec: AdaptSpec, job: AdaptationJob, stages: Stages) -> AdaptResult:
    """The stages from training to report."""
    run, base, parent, dataset = job.run, job.base, job.parent, job.dataset
    trained = await stages.run(
        "train", train_version, job, spec.method, spec.train
    )
    stages.done("train", describe_training(trained.summary))
    for note in trained.summary.notes:
        reporter().said(f"    {note}")
    report = await stages.run(
        "evaluate", evaluate_version, base, parent, trained.adapter, dataset, spec.evaluate,
        spec.train.max_prompt_tokens, trained.summary.notes,
    )  # fmt: skip
    stages.done("evaluate", ", ".join(f"{name} {100 * value:.1f} %" for name, value in report.accuracies.items()))
    decision = await stages.run("gate", decide_gate, report, spec.gate)
    stages.done("gate", "accepted" if decision.accepted else " ".join(decision.reasons))
    for note in decision.notes:
        reporter().said(f"    {note}")
    report = replace(report, notes=(*report.notes, *decision.notes))
    keep_findings(trained.adapter.uri, spec.model_dump(mode="json"), dataset, report, trained.summary)
    version = await stages.run(
        "register", register_version, job, spec, trained.adapter, report, decision
    )
    stages.done("register", f"version {version.version} of {version.lineage}")
    if version.accepted:
        await stages.run("promote", promote_version, version)
        waits = version.approval == "awaiting"
        stages.done("promote", f"version {version.version} {'awaits approval' if waits else 'is champion'}")
    await stages.run(
        "report", report_run, run, version, dataset, report, trained.summary, dict(stages.seconds),
        include_texts=spec.data.include_texts,
    )  # fmt: skip
    stages.done("report", f"deal report {version.version} --lineage {version.lineage}")
    await asyncio.to_thread(
        announce_version, version, task=dataset.task, evaluation=report, tracking_id=run.tracking_id
    )
    return adapted(version, dataset, report, trained.summary, run.tracking_id, stages.seconds)


def describe(dataset: DatasetRef) -> str:
    """A dataset in a few words."""
    rejected = f", {dataset.num_rejected} in quarantine" if dataset.num_rejected else ""
    gained = f", new labels: {listed(dataset.new_labels)}" if dataset.new_labels else ""
    return f"{dataset.num_train} training rows, {dataset.num_test} test rows{rejected}{gained}"


def describe_training(summary: TrainSummary) -> str:
    """A training in a few words."""
    resumed = f", resumed from step {summary.resumed_from_step}" if summary.resumed_from_step is not None else ""
    losses = [loss for _, loss in summary.losses]
    course = f", loss {losses[0]:.2f} → {losses[-1]:.2f}" if losses else ""
    return f"{summary.num_steps} steps, {summary.rows_per_second:.1f} rows/s{course}{resumed}"
