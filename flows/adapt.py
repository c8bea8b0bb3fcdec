"""Adapt: one arrival becomes the next version of a lineage, and its champion if it passes the gate.

Example:
    >>> result = asyncio.run(adapt(read_spec(Path("examples/bank/spec.yaml"))))  # doctest: +SKIP
    >>> result.status  # doctest: +SKIP
    'promoted'
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, replace
from typing import Any

from prefect import flow

from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig
from deal_core.errors import ConfigError
from deal_core.printable import listed
from flows.lock import hold_lineage
from flows.results import AdaptResult, adapted, repeated
from infra.disk import disk_full
from tasks.adaptation.begin import count_attempts, find_own, find_parent, find_registered, find_repeat, make_run_key
from tasks.adaptation.evaluate import evaluate_version
from tasks.adaptation.ingest import drop_training_rows, ingest_arrival
from tasks.adaptation.promote import promote_version
from tasks.adaptation.register import decide_gate, register_version
from tasks.adaptation.report import report_run
from tasks.adaptation.resume import keep_findings
from tasks.adaptation.train import train_version
from tasks.base import identify_base
from tasks.context import current_store, end_run, fail_run, remove_work, start_run
from tasks.lineage.record import LineageRecord, read_record, require_same_base
from tasks.lineage.resolve_spec import AskedSpec
from tasks.notices import announce_failure, announce_version
from tasks.planning import refuse_what_cannot_fit
from tasks.progress import Interrupted, Stages, reporter
from tasks.references import Arrival, BaseRef, DatasetRef, RunRef, TrainSummary, VersionRef
from tasks.spec import DEFAULT_STRATEGY, AdaptSpec


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
        result = await _learn(spec, Job(run, base, parent, dataset, adapter, strategy, config_sha256), stages)
    except BaseException:
        fail_run(run)
        raise
    end_run(run, "FINISHED")
    remove_work(run)
    drop_training_rows(current_store(), dataset.uri)
    return result


@dataclass(frozen=True)
class Job:
    """What a run works on."""

    run: RunRef
    base: BaseRef
    parent: VersionRef | None
    dataset: DatasetRef
    adapter: AdapterConfig
    strategy: str
    config_sha256: str


async def _learn(spec: AdaptSpec, job: Job, stages: Stages) -> AdaptResult:
    """The stages from training to report."""
    run, base, parent, dataset = job.run, job.base, job.parent, job.dataset
    trained = await stages.run(
        "train", train_version, run, base, parent, dataset, job.strategy, job.adapter, spec.method, spec.train
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
        "register", register_version, run, base, parent, dataset, trained.adapter, report, decision,
        job.strategy, job.adapter, job.config_sha256, spec.train.max_prompt_tokens,
        spec.evaluate.max_new_tokens, spec.gate.approval,
    )  # fmt: skip
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


def arrival_of(spec: AdaptSpec) -> Arrival:
    """The arrival that a spec is about."""
    task = spec.task
    return Arrival(task=task.name, data=task.data, test_data=task.test_data, given=task.given())


def choose_base(spec: AdaptSpec, record: LineageRecord | None) -> str:
    """The base model that is asked for, else the lineage's own, else the default."""
    return spec.base_model or (record.base.source if record else DEFAULT_BASE)


def choose_adapter(spec: AdaptSpec, record: LineageRecord | None) -> AdapterConfig:
    """The adapter's shape that is asked for, else the lineage's own, else the default.

    Raises:
        ConfigError: another shape is asked for than the lineage's adapter has.
    """
    if record is None:
        return spec.adapter or AdapterConfig()
    if spec.adapter is not None and spec.adapter != record.adapter:
        raise ConfigError(
            f"The adapter of lineage '{record.lineage}' has the shape {record.adapter}, the spec asks for "
            f"{spec.adapter}; leave adapter out of the spec, or start a new lineage with --lineage."
        )
    return record.adapter


def choose_strategy(spec: AdaptSpec, record: LineageRecord | None) -> str:
    """The strategy that is asked for, else the lineage's own, else the default."""
    return spec.strategy or (record.strategy if record else DEFAULT_STRATEGY)


def settings_of(spec: AdaptSpec, adapter: AdapterConfig, strategy: str) -> dict[str, Any]:
    """The settings of a run, for its log."""
    parts = {"deal", "rehearsal", "rivals", "train", "evaluate", "data", "gate"}
    settings = spec.model_dump(mode="json", include=parts)
    return {**settings, "adapter": asdict(adapter), "strategy": strategy}


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
