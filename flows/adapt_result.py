"""The result of an adaptation, and the sentence that says how it ended."""

from __future__ import annotations

import shlex
from typing import Any

from pydantic import BaseModel

from deal_core.evaluation.accuracy_matrix import MatrixJson
from deal_core.evaluation.arrival_check import ArrivalScore
from deal_core.evaluation.report import AddedRows
from infra.lineage_state import HeldByCheck
from infra.outcomes import Outcome
from infra.versions import Version
from tasks.adaptation.report import Findings
from tasks.adaptation.run import AdaptationRun
from tasks.progress import stage_times
from tasks.references import Contradiction, DatasetRef


class AdaptResult(BaseModel, frozen=True):
    """The result of one adaptation."""

    status: Outcome
    """How the run ended; see `infra.outcomes.Outcome`."""
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


def repeated(version: Version, dataset: DatasetRef) -> AdaptResult:
    """Return the result of a run whose rows an earlier version has learned."""
    trained = f"version {version.version} was trained on this arrival"
    remedy = "change the settings or give --force"
    match version.kind, version.standing:
        case "consolidation", "learned":
            why = f"{_consolidation(version)}, and no arrival was learned since"
        case "consolidation", standing:
            why = f"{_consolidation(version)}, and has learned the same rows with the same settings ({standing})"
        case _, "learned":
            why = f"version {version.version} has learned from this arrival; --force trains anew"
        case _, "awaiting approval":
            why = f"{trained} and {_awaits_approval(version)}"
        case _, "rollout":
            why = f"{trained} and {_in_rollout(version)}"
        case _, "remade":
            why = f"{trained} again, and waits for the end of its branch"
        case _, "left behind":
            again = f"deal version requeue {version.version} --lineage {version.lineage}"
            why = f"{trained}, but the champion does not continue it; learn it again with {again}"
        case _, "rejected by a person":
            why = f"{trained} and was rejected; {remedy}"
        case _, "rejected by its rollout":
            why = f"{trained} and was rejected by its rollout; {remedy}"
        case _:
            why = f"{trained} with the same parent and settings and rejected; {remedy}"
    return _result(version, dataset, status="repeat", message=f"Nothing to do: {why}.")


def _consolidation(version: Version) -> str:
    return f"version {version.version} of {version.lineage} is a consolidation"


def skipped(adaptation: AdaptationRun) -> AdaptResult:
    """Return the result of a run that trained nothing, because the champion answers the new rows well enough."""
    champion, tested = adaptation.parent, adaptation.tested
    assert champion is not None and tested is not None, "the champion was asked"
    return _result(
        champion,
        adaptation.dataset,
        status="skipped",
        message=f"Nothing to learn: {tested.sentence}. Version {champion.version} stays champion.",
        arrival=tested.score,
        seconds=stage_times(),
    )


def held(adaptation: AdaptationRun, noted: HeldByCheck) -> AdaptResult:
    """Return the result of a run that trained nothing, because the labels of its arrival disagree with the champion."""
    champion, tested, spec = adaptation.parent, adaptation.tested, adaptation.spec
    assert champion is not None and tested is not None, "the champion was asked"
    shows_texts = spec.data.include_texts
    release = shlex.join(["deal", "data", "release", *noted.names, "--lineage", spec.lineage])
    result = _result(
        champion,
        adaptation.dataset,
        status="held",
        message=f"Nothing was learned: {noted.why} If they are right, let the arrival go on with: {release}",
        arrival=tested.score,
        contradictions=tuple(row if shows_texts else row.without_texts for row in tested.contradictions),
        seconds=stage_times(),
    )
    return result.model_copy(update={"rejected": False, "reasons": (noted.why,)})


def adapted(version: Version, findings: Findings) -> AdaptResult:
    """Return the result of a run that trained."""
    report, summary = findings.evaluation, findings.training
    return _result(
        version,
        findings.dataset,
        status=version.outcome,
        message=f"Version {version.version} of {version.lineage} {_words_of(version)}.",
        arrival=version.arrival,
        accuracies=dict(report.accuracies),
        added=report.added,
        matrix=report.matrix.to_json(),
        metrics=dict(report.metrics),
        num_steps=summary.num_steps,
        resumed_from_step=summary.resumed_from_step,
        seconds=stage_times(),
    )


def _words_of(version: Version) -> str:
    """How the run of a version ended, in words."""
    match version.outcome:
        case "rejected":
            return "was rejected by the gate; the champion stays as it was"
        case "remade":
            return f"learned the arrival of version {version.remakes} again; the champion stays"
        case "awaiting approval":
            return _awaits_approval(version)
        case "rollout":
            return _in_rollout(version)
        case _:
            return "is champion"


def _awaits_approval(version: Version) -> str:
    which = f"{version.version} --lineage {version.lineage}"
    return f"awaits approval: deal version promote {which}, or deal version reject {which} --reason REASON"


def _in_rollout(version: Version) -> str:
    return f"is tried on live traffic: deal rollout status --lineage {version.lineage}"


def _result(version: Version, dataset: DatasetRef, **fields: Any) -> AdaptResult:
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
