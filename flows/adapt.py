"""Adapt: one arrival becomes the next version of a lineage, and the champion if the version passes the gate."""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

from prefect import flow
from pydantic import BaseModel

from deal_core.errors import DealError, in_one_line
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix, MatrixJson
from deal_core.evaluation.arrival_check import ArrivalScore
from deal_core.evaluation.interval import score_text
from deal_core.evaluation.report import AddedRows
from deal_core.safe_text import listed
from flows.lock import lock_lineage
from infra.disk import disk_full
from infra.run_journal import Run, RunJournal
from infra.versions import Version, Versions
from tasks.adaptation import run as runs
from tasks.adaptation.evaluate import evaluate_version
from tasks.adaptation.gate import judge_version
from tasks.adaptation.general import require_suites
from tasks.adaptation.ingest import ingest_arrival
from tasks.adaptation.promote import promote_version
from tasks.adaptation.register import register_version
from tasks.adaptation.report import Findings, report_version
from tasks.adaptation.resume import changed_since, find_parent, keep_findings
from tasks.adaptation.run import AdaptationRun, Remake, RunInputs, prepare
from tasks.adaptation.train import train_version
from tasks.arrival_check import remark_on, score_arrival
from tasks.base import refuse_what_cannot_fit
from tasks.context import current_store
from tasks.lineage.branch import require_no_branch
from tasks.lineage.choices import choose_adapter, choose_base, choose_strategy
from tasks.lineage.datasets import drop_held_rows, drop_training_rows
from tasks.lineage.held import end_hold, hold, is_released
from tasks.lineage.record import read_record, require_same_base
from tasks.lineage.retrain import AT_ONCE, RetrainPolicy
from tasks.lineage.settings import AskedSpec
from tasks.mlflow_mirror import end_failed, sync_lineage
from tasks.notices import announce_failure, announce_held, announce_version
from tasks.progress import Interrupted, Stages, reporter
from tasks.references import Contradiction, DatasetRef, ScoredArrival, TrainSummary
from tasks.spec import AdaptSpec

logger = logging.getLogger(__name__)
Status = Literal["promoted", "awaiting approval", "rollout", "rejected", "repeat", "skipped", "held", "remade"]


class Scores(BaseModel, frozen=True):
    """The scores of one version; None if undefined (a lineage of one task has no forgetting)."""

    average_accuracy: float | None
    """Mean accuracy on all tasks."""
    forgetting: float | None
    """Mean of what the earlier tasks have lost since their best version; below 0: a gain."""
    backward_transfer: float | None
    """Mean of what the earlier tasks have gained since they were learned."""
    forward_transfer: float | None
    """Mean of what a task had gained over the base model before it was learned."""

    @classmethod
    def of(cls, matrix: AccuracyMatrix) -> Scores:
        """Return the scores of a matrix's last version."""
        return cls(**{name: getattr(matrix, name) for name in cls.model_fields})


class AdaptResult(BaseModel, frozen=True):
    """The result of one adaptation."""

    status: Status
    """promoted: the version is champion. repeat: an earlier version has learned the arrival. skipped: nothing was
    trained, since the champion answers the rows well enough. held: nothing was trained, since the labels disagree with
    the champion. remade: the version is one of a branch."""
    rejected: bool
    """Whether the gate rejected the version, in this run or in the run that this run repeats."""
    message: str
    """The outcome in one sentence."""
    lineage: str
    task: str
    version: str
    """Number of the version; of the champion if the arrival was skipped or held."""
    parent_version: str | None
    """The version that it continues; None: it starts from the base model."""
    reasons: tuple[str, ...]
    """Why the gate rejected the version, or why the arrival is held."""
    unsure: tuple[str, ...] = ()
    """If the gate accepted the version: the tasks on which it could not have seen a drop of gate.max_drop_points."""
    dataset: DatasetRef
    run_key: str
    """Key of the adaptation."""
    arrival: ArrivalScore | None = None
    """What the champion scored on the arrival before anything was trained; None: the task was new, or no row could be
    asked."""
    contradictions: tuple[Contradiction, ...] = ()
    """Of an arrival that is held: the rows whose label the champion contradicts most surely."""
    accuracies: dict[str, float] = {}
    """Task → accuracy of the version on the task's test rows; empty if nothing was trained."""
    added: AddedRows | None = None
    """The test rows that the version adds to those of its task, and the scores on them."""
    scores: Scores | None = None
    """None: nothing was trained."""
    matrix: MatrixJson | None = None
    """The matrix up to the version; None: nothing was trained."""
    metrics: dict[str, str] = {}
    """Each task's metric."""
    num_steps: int = 0
    """Optimiser steps of the training."""
    resumed_from_step: int | None = None
    """The checkpoint's step from which the training went on; None: it began at the first one."""
    seconds: dict[str, float] = {}
    """Stage → its time."""


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
    await asyncio.to_thread(require_no_branch, current_store(), spec.lineage)  # its run may hold the lineage for long
    async with lock_lineage(spec.lineage):
        return await learn_arrival(spec, again)


@flow(name="adapt-arrival", flow_run_name="adapt-{spec.lineage}-{spec.task.name}")
async def adapt_locked(spec: AdaptSpec, retrain: RetrainPolicy = AT_ONCE) -> AdaptResult:
    """Learn one arrival as `adapt` does, unless `retrain` lets it be skipped. The caller holds the lineage."""
    return await learn_arrival(spec, again=False, retrain=retrain)


class NothingToLearnError(DealError):
    """Nothing is trained: a version has learned the arrival, the champion answers it well enough, or it is held."""

    code = "nothing-to-learn"

    def __init__(self, result: AdaptResult) -> None:
        super().__init__(result.message)
        self.result = result


async def learn_arrival(
    spec: AdaptSpec,
    again: bool,
    retrain: RetrainPolicy = AT_ONCE,
    *,
    requeued_sha256: str | None = None,
    remake: Remake | None = None,
) -> AdaptResult:
    """Learn one arrival, and announce a failure. The caller holds the lineage.

    `retrain` says whether the arrival may be skipped. `requeued_sha256` is the dataset of the version whose arrival is
    learned again. As the step `remake` of a branch, the new version does not become champion.
    """
    stages = Stages()
    async with announcing_failure(spec.lineage, spec.task.name):
        try:
            adaptation = await begin(
                spec, stages, again=again, retrain=retrain, requeued_sha256=requeued_sha256, remake=remake
            )
        except NothingToLearnError as nothing:
            result, store = nothing.result, current_store()
            if result.status == "held":
                drop_held_rows(store, spec.lineage, result.dataset)
                await asyncio.to_thread(
                    announce_held,
                    spec.lineage,
                    spec.task.name,
                    result.reasons[0],
                    champion=result.version,
                    arrival=result.dataset.landed_sha256,
                )
            else:
                drop_training_rows(store, result.dataset.uri)
            return result
        return await finish(adaptation, stages)


@asynccontextmanager
async def announcing_failure(lineage: str, task: str | None) -> AsyncIterator[None]:
    """Announce the error of the block; turn the error of a full disk into one that says so."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        full = disk_full(error)
        await asyncio.to_thread(announce_failure, lineage, task, full or error)
        if full is not None and full is not error:
            raise full from error
        raise


async def begin(
    spec: AdaptSpec,
    stages: Stages | None = None,
    *,
    again: bool = False,
    retrain: RetrainPolicy = AT_ONCE,
    requeued_sha256: str | None = None,
    remake: Remake | None = None,
) -> AdaptationRun:
    """Find the parent, check and store the arrival, load the base model, start the run. The caller holds the lineage.

    `stages` gets the times of the stages. For the other arguments and errors see `adapt` and `learn_arrival`.

    Raises:
        NothingToLearnError: A version has learned the arrival, or it is skipped or held.
    """
    stages, store = stages or Stages(), current_store()
    parent = await stages.run("parent", find_parent, spec.lineage, remake)
    synced = await stages.run("mlflow", sync_lineage, store, spec.lineage)  # after an interrupted run has its report
    if synced.promoted is not None and remake is None:  # somebody has moved the alias there
        parent = Versions(store).champion(spec.lineage)
    record = read_record(store, parent) if parent else None
    adapter, strategy = choose_adapter(spec, record), choose_strategy(spec, record)
    await asyncio.to_thread(require_suites, spec.evaluate)  # rather now than after the training
    dataset = remake.dataset if remake else None
    if dataset is None:
        asked = remake.asked if remake else None
        dataset = await stages.run(
            "ingest", ingest_arrival, spec.task, spec.data, record, spec.lineage, again, asked, parent
        )
        stages.done("ingest", _describe_dataset(dataset))
    _say(dataset.warnings)
    # Before the base model is loaded: most repeats are known by their rows alone. A branch repeats on purpose.
    find_repeat = runs.find_own if again else runs.find_repeat
    if remake is None and (version := await stages.run("repeat", find_repeat, dataset, spec.lineage)):
        raise NothingToLearnError(repeated(version, dataset))
    source, num_versions = choose_base(spec, record), len(record.matrix.trained) if record else 0
    await asyncio.to_thread(
        refuse_what_cannot_fit, source, adapter, strategy, spec.method, spec.train, num_versions=num_versions
    )
    base = await stages.run("base", runs.identify_base, source, spec.train.quantize)
    stages.done("base", base.name)
    if record:
        require_same_base(record, base)
    attempt = await stages.run("repeat", runs.count_attempts, spec.lineage, dataset) if again else 0
    inputs = RunInputs(
        spec=spec,
        dataset=dataset,
        base=base,
        adapter=adapter,
        strategy=strategy,
        parent=parent,
        record=record,
        attempt=attempt,
        requeued_sha256=requeued_sha256,
        remake=remake,
    )
    # By the key a run that was interrupted goes on.
    if version := await stages.run("repeat", Versions(store).with_run_key, spec.lineage, inputs.run_key):
        raise NothingToLearnError(repeated(version, dataset))
    # The version before answers the rows of a task that it knows. They may be answered well enough already, or their
    # labels may be wrong. What a person has asked to learn again is scored only.
    if parent is not None and record is not None and record.task(dataset.task) is not None:
        tested = await stages.run("test", score_arrival, spec, dataset, parent, record, runs.jobs_of(inputs))
        stages.done("test", "no new row can be asked" if tested is None else tested.sentence)
        if tested is not None and remake is None and requeued_sha256 is None:
            if retrain.skips(tested.score.accuracy, brings_labels=bool(dataset.new_labels)):
                raise NothingToLearnError(skipped(parent, dataset, tested, stages.seconds))
            if is_released(store, spec.lineage, spec.task, dataset):
                tested = tested.model_copy(update={"score": replace(tested.score, is_released=True)})
            elif tested.score.verdict == "labels disagree" and spec.gate.arrival == "hold":
                raise NothingToLearnError(held(parent, spec, dataset, tested, stages.seconds))
        inputs = replace(inputs, tested=tested)
    run = await stages.run("start", runs.start_run, inputs)
    async with failing(run):
        return await stages.run("start", prepare, inputs, run)


async def finish(adaptation: AdaptationRun, stages: Stages) -> AdaptResult:
    """Run the stages from training to report, and what follows them.

    A report that fails does not fail the run: the version is registered, and may serve already.
    """
    store, run = current_store(), adaptation.run
    async with failing(run):
        version, findings = await _train_to_promotion(adaptation, stages)
    is_reported = await _report(adaptation, version, findings, stages)
    await asyncio.to_thread(announce_version, version, evaluation=findings.evaluation)
    runs.remove_work(run)
    drop_training_rows(store, adaptation.dataset.uri)
    end_hold(store, run.lineage, adaptation.spec.task)
    if is_reported:  # last: a run that has not ended is completed by the lineage's next run
        RunJournal(store).end(run, "finished")
    synced = await stages.run("mlflow", sync_lineage, store, run.lineage)
    if synced.problem is not None:
        _say([f"MLflow lacks {listed(synced.missing)}; the next run or deal server sync writes it"])
    return adapted(version, findings, stages.seconds)


@asynccontextmanager
async def failing(run: Run) -> AsyncIterator[None]:
    """Write into the journal that the run failed, if the block does."""
    try:
        yield
    except BaseException:
        with suppress(DealError):  # it must not hide the run's own error
            end_failed(RunJournal(current_store()).end(run, "failed"))
        raise


async def _train_to_promotion(adaptation: AdaptationRun, stages: Stages) -> tuple[Version, Findings]:
    """Run the stages from training to promotion."""
    notes = changed_since(adaptation.parent, adaptation.spec) if adaptation.parent else ()
    if adaptation.tested is not None:
        notes += (remark_on(adaptation.tested),)
    _say(notes)
    trained = await stages.run("train", train_version, adaptation)
    stages.done("train", _describe_training(trained.summary))
    _say(trained.summary.notes)
    notes += trained.summary.notes
    report = await stages.run("evaluate", evaluate_version, adaptation, trained, notes)
    scores = [f"{name} {score_text(share, report.num_rows.get(name))}" for name, share in report.accuracies.items()]
    stages.done("evaluate", f"in %: {'; '.join(scores)}")
    _say(report.notes[len(notes) :])
    decision = await stages.run("gate", judge_version, adaptation, report)
    stages.done("gate", "accepted" if decision.accepted else " ".join(decision.reasons))
    _say(decision.notes)
    report = replace(report, notes=(*report.notes, *decision.notes))
    findings = Findings(
        spec=adaptation.spec.model_dump(mode="json"),
        dataset=adaptation.dataset,
        evaluation=report,
        training=trained.summary,
    )
    keep_findings(trained.uri, findings)
    version = await stages.run("register", register_version, adaptation, trained, report, decision)
    stages.done("register", f"version {version.version} of {version.lineage}")
    if version.accepted and adaptation.remake is None:
        version = await stages.run("promote", promote_version, version)
        stages.done("promote", f"version {version.version} {_PROMOTED[version.outcome]}")
    return version, findings


async def _report(adaptation: AdaptationRun, version: Version, findings: Findings, stages: Stages) -> bool:
    """Write the report of a version; return whether it was written. The version stands without it."""
    name, answers, seconds = adaptation.base.name, adaptation.parent_answers.now, dict(stages.seconds)
    try:
        await stages.run("report", report_version, version, name, findings, seconds, answers)
    except Interrupted:
        raise
    except Exception as error:
        logger.exception("The report of version %s of %s was not written", version.version, version.lineage)
        _say([f"The report was not written, and the lineage's next run tries it again: {in_one_line(error)}"])
        return False
    stages.done("report", f"deal version show {version.version} --report --lineage {version.lineage}")
    return True


def _say(notes: Iterable[str]) -> None:
    for note in notes:
        reporter().said(f"    {note}")


_PROMOTED = {"promoted": "is champion", "awaiting approval": "awaits approval", "rollout": "is tried on live traffic"}


def _describe_dataset(dataset: DatasetRef) -> str:
    rejected = f", {dataset.num_rejected} in quarantine" if dataset.num_rejected else ""
    gained = f", new labels: {listed(dataset.new_labels)}" if dataset.new_labels else ""
    return f"{dataset.num_train} training rows, {dataset.num_test} test rows{rejected}{gained}"


def _describe_training(summary: TrainSummary) -> str:
    resumed = f", resumed from step {summary.resumed_from_step}" if summary.resumed_from_step is not None else ""
    losses = [loss for _, loss in summary.losses]
    course = f", loss {losses[0]:.2f} → {losses[-1]:.2f}" if losses else ""
    return f"{summary.num_steps} steps, {summary.rows_per_second:.1f} rows/s{course}{resumed}"


def repeated(version: Version, dataset: DatasetRef) -> AdaptResult:
    """Return the result of a run whose arrival an earlier version has learned."""
    number, option = version.version, f" --lineage {version.lineage}"
    trained = f"version {number} was trained on this arrival"
    messages = {
        "learned": f"version {number} has learned from this arrival; --force trains anew.",
        "awaiting approval": f"{trained} and {_awaits_approval(version)}.",
        "rollout": f"{trained} and {_in_rollout(version)}.",
        "remade": f"{trained} again, and waits for the end of its branch.",
        "left behind": f"{trained}, but the champion does not continue it; learn it again with "
        f"deal version requeue {number}{option}.",
        "rejected by a person": f"{trained} and was rejected; change the settings or give --force.",
        "rejected by its rollout": f"{trained} and was rejected by its rollout; change the settings or give --force.",
        "rejected by the gate": f"{trained} with the same parent and settings and rejected; change the settings or "
        "give --force.",
    }
    message = "Nothing to do: " + messages[version.standing]
    return result_of(version, dataset, status="repeat", message=message)


def skipped(champion: Version, dataset: DatasetRef, tested: ScoredArrival, seconds: dict[str, float]) -> AdaptResult:
    """Return the result of a run that trained nothing, because the champion answers the new rows well enough."""
    message = f"Nothing to learn: {tested.sentence}. Version {champion.version} stays champion."
    return result_of(champion, dataset, status="skipped", message=message, arrival=tested.score, seconds=seconds)


def held(
    champion: Version, spec: AdaptSpec, dataset: DatasetRef, tested: ScoredArrival, seconds: dict[str, float]
) -> AdaptResult:
    """Hold an arrival whose labels disagree with the champion; return the result of the run, which trained nothing."""
    noted = hold(current_store(), spec.lineage, spec.task, dataset, remark_on(tested))
    shown = spec.data.include_texts
    release = shlex.join(["deal", "data", "release", *noted.names, "--lineage", spec.lineage])
    result = result_of(
        champion,
        dataset,
        status="held",
        message=f"Nothing was learned: {noted.why} If they are right, let the arrival go on with: {release}",
        arrival=tested.score,
        contradictions=tuple(each if shown else each.without_texts for each in tested.contradictions),
        seconds=seconds,
    )
    return result.model_copy(update={"rejected": False, "reasons": (noted.why,)})


def adapted(version: Version, findings: Findings, seconds: dict[str, float]) -> AdaptResult:
    """Return the result of a run that trained."""
    report, summary = findings.evaluation, findings.training
    status: Status = "promoted"
    verdict = "is champion"
    if not version.accepted:
        status, verdict = "rejected", "was rejected by the gate; the champion stays as it was"
    elif version.branch is not None:
        status, verdict = "remade", f"learned the arrival of version {version.remakes} again; the champion stays"
    elif version.approval == "awaiting":
        status, verdict = "awaiting approval", _awaits_approval(version)
    elif version.outcome == "rollout":
        status, verdict = "rollout", _in_rollout(version)
    return result_of(
        version,
        findings.dataset,
        status=status,
        message=f"Version {version.version} of {version.lineage} {verdict}.",
        arrival=version.arrival,
        accuracies=dict(report.accuracies),
        added=report.added,
        scores=Scores.of(report.matrix),
        matrix=report.matrix.to_json(),
        metrics=dict(report.metrics),
        num_steps=summary.num_steps,
        resumed_from_step=summary.resumed_from_step,
        seconds=seconds,
    )


def _awaits_approval(version: Version) -> str:
    which = f"{version.version} --lineage {version.lineage}"
    return f"awaits approval: deal version promote {which}, or deal version reject {which} --reason REASON"


def _in_rollout(version: Version) -> str:
    return f"is tried on live traffic: deal rollout status --lineage {version.lineage}"


def result_of(version: Version, dataset: DatasetRef, **fields: Any) -> AdaptResult:
    """Return the result of a run that made this version, or found it."""
    return AdaptResult(
        rejected=not version.accepted,
        lineage=version.lineage,
        task=dataset.task,
        version=version.version,
        parent_version=version.parent_version,
        reasons=version.reasons,
        unsure=version.unsure,
        dataset=dataset,
        run_key=version.run_key,
        **fields,
    )
