"""Adapt: one arrival becomes the next version of a lineage, and the champion if the version passes the gate.

`learn` does the same on a branch, and with all arrivals together (`flows.consolidate`). Every stage is a Prefect task
that is started with plain values, so a flow of your own can use some of them (docs/own_flow.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any

from prefect import flow
from pydantic import BeforeValidator

from deal_core.errors import in_one_line
from deal_core.safe_text import listed
from flows.adapt_result import AdaptResult, adapted, held, repeated, skipped
from flows.lock import lock_lineage
from infra.branches import Head
from infra.run_journal import RunJournal
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.adaptation.consolidate import plan_rows
from tasks.adaptation.evaluate import evaluate_version
from tasks.adaptation.gate import judge_version
from tasks.adaptation.general import require_suites
from tasks.adaptation.ingest import ask_parent, hold_arrival, ingest_again, ingest_arrival
from tasks.adaptation.promote import promote_version
from tasks.adaptation.register import register_version
from tasks.adaptation.repeat import find_repeat
from tasks.adaptation.report import Findings, report_version
from tasks.adaptation.resume import changed_since, find_parent, read_findings
from tasks.adaptation.run import AdaptationRun, failing, load_base, plan_run, remove_work, start_run
from tasks.adaptation.train import CONSOLIDATION_STRATEGY, train_version
from tasks.arrival_check import remark_on
from tasks.lineage.branch import require_no_branch
from tasks.lineage.choices import choose_adapter, choose_strategy
from tasks.lineage.consolidation import Start
from tasks.lineage.datasets import drop_training_rows
from tasks.lineage.held import end_hold
from tasks.lineage.record import read_record
from tasks.lineage.retrain import DEFAULT_POLICY, RetrainPolicy
from tasks.lineage.settings import over_stored
from tasks.mlflow_mirror import sync_lineage
from tasks.notices import announce_version, announcing_failure
from tasks.progress import Interrupted, in_stage, reporter, stage_times, time_stages, to_the_end
from tasks.spec import AdaptSpec

logger = logging.getLogger(__name__)


def _fill_in(spec: Any) -> Any:
    """Put a mapping over the lineage's file. An AdaptSpec is complete."""
    return over_stored(open_store(), spec) if isinstance(spec, Mapping) else spec


AskedSpec = Annotated[AdaptSpec, BeforeValidator(_fill_in)]
"""A spec as the flow's parameter. Missing settings come from the lineage's file when the run starts."""


@flow(name="adapt", flow_run_name="adapt-{spec.lineage}-{spec.task.name}")
async def adapt(spec: AskedSpec, again: bool = False) -> AdaptResult:
    """Learn one arrival.

    Args:
        spec: The arrival, the lineage and the settings.
        again: Train even if the lineage has learned this arrival. A run that restarts does not train twice.

    Raises:
        BranchOpenError: Versions of the lineage are being made again.
        ConfigError: The spec contradicts the lineage.
        DataValidationError: The whole file is refused.
    """
    store = open_store()
    await asyncio.to_thread(require_no_branch, store, spec.lineage)  # its run may hold the lineage for long
    async with lock_lineage(spec.lineage):
        return await learn(store, spec, again=again)


@flow(name="adapt-arrival", flow_run_name="adapt-{spec.lineage}-{spec.task.name}")
async def adapt_locked(spec: AdaptSpec, retrain: RetrainPolicy = DEFAULT_POLICY) -> AdaptResult:
    """Learn one arrival as `adapt` does, unless `retrain` lets it be skipped. The caller holds the lineage."""
    return await learn(open_store(), spec, retrain=retrain)


async def learn(
    store: ObjectStore,
    spec: AdaptSpec,
    head: Head | None = None,
    *,
    again: bool = False,
    retrain: RetrainPolicy = DEFAULT_POLICY,
    together: Start | None = None,
    relearns: Version | None = None,
) -> AdaptResult:
    """Make the next version of a head, and announce a failure. For the arguments see `begin`."""
    async with announcing_failure(spec.lineage, spec.task.name if together is None else None):
        prepared = await begin(store, spec, head, again=again, retrain=retrain, together=together, relearns=relearns)
        if isinstance(prepared, AdaptResult):
            drop_training_rows(store, prepared.dataset.uri)
            return prepared
        return await finish(store, prepared)


async def begin(
    store: ObjectStore,
    spec: AdaptSpec,
    head: Head | None = None,
    *,
    again: bool = False,
    retrain: RetrainPolicy = DEFAULT_POLICY,
    together: Start | None = None,
    relearns: Version | None = None,
) -> AdaptationRun | AdaptResult:
    """Do all that comes before the training. The caller holds the lineage.

    Args:
        store: The store, which has the lineage. The stages open it themselves.
        spec: The arrival, the lineage and the settings. A consolidation uses the settings alone.
        head: What the new version continues; None: the champion.
        again: Train even if the lineage has learned this arrival.
        retrain: Whether the arrival may be skipped.
        together: Where the weights of a consolidation start; None: one arrival is learned.
        relearns: The version whose arrival is learned again; None: the arrival is new.

    Returns:
        The run for the stages that follow; or the result, if nothing is trained: a version has learned the arrival, the
        champion answers the arrival well enough, or the arrival's labels disagree with the champion.
    """
    time_stages()
    head = head or Head(lineage=spec.lineage)
    parent = await find_parent(head)
    record = read_record(store, parent) if parent else None
    adapter, strategy = choose_adapter(spec, record), choose_strategy(spec, record)
    await asyncio.to_thread(require_suites, spec.evaluate)  # rather now than after the training

    plan = None
    if together is not None:
        assert parent is not None and record is not None, "its caller has found the champion"
        if parent.is_consolidation:  # such as one whose run was killed, and is complete now
            return repeated(parent, read_findings(store, parent.adapter_uri).dataset)
        plan = await plan_rows(parent, record, together, spec)
        dataset = plan.as_dataset(record.matrix.trained[-1])
    elif head.branch is not None:
        assert relearns is not None, "a branch learns what was learned before"
        dataset = await ingest_again(relearns, spec, record, parent)
    else:
        dataset = await ingest_arrival(spec.task, spec.data, record, spec.lineage, again, parent)
    _say(dataset.warnings)
    # Before the base model is loaded: most repeats are known by their rows alone. A branch repeats on purpose.
    may_repeat = plan is None and head.branch is None
    if may_repeat and (version := await in_stage("repeat", find_repeat, store, dataset, spec.lineage, again)):
        return repeated(version, dataset)

    base = await load_base(spec, record, adapter, CONSOLIDATION_STRATEGY if plan else strategy)
    adaptation = await in_stage(
        "repeat",
        plan_run,
        store,
        again=again,
        head=head,
        spec=spec,
        dataset=dataset,
        base=base,
        adapter=adapter,
        strategy=strategy,
        parent=parent,
        record=record,
        relearns=relearns,
        consolidation=plan,
    )
    # By the key a run that was interrupted goes on.
    if version := await in_stage("repeat", Versions(store).with_run_key, spec.lineage, adaptation.run_key):
        return repeated(version, dataset)

    # The parent answers the rows of a task that it knows. They may be answered well enough already, or their labels may
    # be wrong. What a person has asked to learn again is scored only.
    if plan is None and record is not None and record.task(dataset.task) is not None:
        tested = await ask_parent(adaptation)
        if tested is not None:
            adaptation = adaptation.model_copy(update={"tested": tested, "row_scores": tested.scores})
        if tested is not None and relearns is None:
            if retrain.skips(tested.score.accuracy, brings_labels=bool(dataset.new_labels)):
                return skipped(adaptation)
            disagrees = tested.score.verdict == "labels disagree" and not tested.score.is_released
            if disagrees and spec.gate.arrival == "hold":
                return held(adaptation, await to_the_end(hold_arrival, store, adaptation))

    await start_run(adaptation)
    return adaptation


async def finish(store: ObjectStore, adaptation: AdaptationRun) -> AdaptResult:
    """Run the stages from training to report, and what follows them.

    A report that fails does not fail the run: the version is registered, and may serve already.
    """
    spec, run = adaptation.spec, adaptation.run
    with failing(store, run):
        notes = changed_since(store, adaptation.parent, spec) if adaptation.parent else ()
        notes += (remark_on(adaptation.tested),) if adaptation.tested else ()
        _say(notes)
        trained = await train_version(adaptation)
        _say(trained.summary.notes)
        notes += trained.summary.notes
        report = await evaluate_version(adaptation, trained, notes)
        _say(report.notes[len(notes) :])
        decision = await judge_version(report, spec.gate)
        _say(decision.notes)
        findings = Findings(
            spec=spec.model_dump(mode="json"),
            dataset=adaptation.dataset,
            evaluation=replace(report, notes=(*report.notes, *decision.notes)),
            training=trained.summary,
        )
        version = await register_version(adaptation, trained, findings, decision)
        if version.accepted and adaptation.head.branch is None:
            version = await promote_version(version)

    is_reported = True
    try:
        await report_version(version, adaptation.base.name, findings, stage_times())
    except Interrupted:
        raise
    except Exception as error:
        is_reported = False
        logger.exception("The report of version %s of %s was not written", version.version, version.lineage)
        _say([f"The report was not written, and the lineage's next run tries it again: {in_one_line(error)}"])
    await asyncio.to_thread(announce_version, version, evaluation=findings.evaluation)
    remove_work(run)
    drop_training_rows(store, adaptation.dataset.uri)
    end_hold(store, run.lineage, spec.task)
    if is_reported:  # last: a run that has not ended is completed by the lineage's next run
        RunJournal(store).end(run, "finished")
    synced = await in_stage("mlflow", sync_lineage, store, run.lineage)
    if synced.problem is not None:
        _say([f"MLflow lacks {listed(synced.missing)}; the next run or deal server sync writes it"])
    return adapted(version, findings)


def _say(notes: Iterable[str]) -> None:
    for note in notes:
        reporter().said(f"    {note}")
