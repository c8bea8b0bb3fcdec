"""What an adaptation ends with, for people, machines and the flows that call it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from deal_core.evaluation.metrics import AccuracyMatrix
from deal_core.evaluation.report import EvaluationReport
from tasks.references import DatasetRef, TrainSummary, VersionRef

Status = Literal["promoted", "awaiting approval", "rejected", "repeat"]


class Scores(BaseModel, frozen=True):
    """The scores of one version; None where undefined (a lineage of one task forgets nothing)."""

    average_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None

    @classmethod
    def of(cls, matrix: AccuracyMatrix) -> Scores:
        """The scores of a matrix's last version."""
        return cls(**{name: getattr(matrix, name) for name in cls.model_fields})


class AdaptResult(BaseModel, frozen=True):
    """The end of one adaptation."""

    status: Status
    rejected: bool
    """The gate rejected the version, in this run or in the one that this run repeats."""
    message: str
    lineage: str
    task: str
    version: str
    parent_version: str | None
    reasons: tuple[str, ...]
    dataset: DatasetRef
    run_key: str
    tracking_id: str | None = None
    accuracies: dict[str, float] = {}
    scores: Scores | None = None
    matrix: dict[str, Any] | None = None
    num_steps: int = 0
    resumed_from_step: int | None = None
    seconds: dict[str, float] = {}


def awaits_approval(version: VersionRef) -> str:
    """What to say of a version that a person has to agree to."""
    which = f"{version.version} --lineage {version.lineage}"
    return f"awaits approval: deal promote {which}, or deal reject {which} --why REASON"


def repeated(version: VersionRef, dataset: DatasetRef) -> AdaptResult:
    """The result of an arrival that a version has learned from, or was rejected with, already."""
    number, option = version.version, f" --lineage {version.lineage}"
    trained = f"version {number} was trained on this arrival"
    said = {
        "learned": f"version {number} has learned from this arrival; --again trains anew.",
        "awaiting approval": f"{trained} and {awaits_approval(version)}.",
        "left behind": f"{trained}, but the champion does not continue it; learn it again with "
                       f"deal requeue {number}{option}.",
        "rejected by a person": f"{trained} and was rejected; change the settings or give --again.",
        "rejected by the gate": f"{trained} with the same parent and settings and rejected; change the settings or "
                                "give --again.",
    }  # fmt: skip
    message = "Nothing to do: " + said[version.standing or "learned"]
    return AdaptResult(
        status="repeat",
        rejected=not version.accepted,
        message=message,
        lineage=version.lineage,
        task=dataset.task,
        version=version.version,
        parent_version=version.parent_version,
        reasons=version.reasons,
        dataset=dataset,
        run_key=version.run_key,
    )


def adapted(
    version: VersionRef,
    dataset: DatasetRef,
    report: EvaluationReport,
    summary: TrainSummary,
    tracking_id: str,
    seconds: dict[str, float],
) -> AdaptResult:
    """The result of a run that trained."""
    status: Status = "promoted"
    verdict = "is champion"
    if not version.accepted:
        status, verdict = "rejected", "was rejected by the gate; the champion stays as it was"
    elif version.approval == "awaiting":
        status, verdict = "awaiting approval", awaits_approval(version)
    return AdaptResult(
        status=status,
        rejected=not version.accepted,
        message=f"Version {version.version} of {version.lineage} {verdict}.",
        lineage=version.lineage,
        task=dataset.task,
        version=version.version,
        parent_version=version.parent_version,
        reasons=version.reasons,
        dataset=dataset,
        run_key=version.run_key,
        tracking_id=tracking_id,
        accuracies=dict(report.accuracies),
        scores=Scores.of(report.matrix),
        matrix=report.matrix.to_json(),
        num_steps=summary.num_steps,
        resumed_from_step=summary.resumed_from_step,
        seconds=seconds,
    )
