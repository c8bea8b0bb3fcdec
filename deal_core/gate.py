"""The gate: may a new version become champion? A pure function of an evaluation and of thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deal_core.config import GateConfig
from deal_core.metrics import AccuracyMatrix

SCHEMA_VERSION = 1
_SLACK = 1e-9
"""Accuracies are quotients of counts: 0.6 − 0.5 must not miss a floor of 10 points by a rounding error."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What one adapter version can do, beside its parent and the untouched base. Accuracies are shares, 0 to 1."""

    task: str
    """The task that the version was trained on."""
    accuracies: Mapping[str, float]
    """The new version on every task of the lineage."""
    parent_accuracies: Mapping[str, float]
    """Its parent on every task that the parent had learned, `task` too where it arrives again; empty for the first."""
    base_accuracy: float
    """The untouched base model on the task."""
    parent_accuracy_new_task: float | None
    """The parent on the task, before training; None for the first version."""
    num_rows: Mapping[str, int]
    """Test rows of each task."""
    matrix: AccuracyMatrix
    """The lineage's matrix, with the new version as its last row."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know, such as a full adapter."""

    def __post_init__(self) -> None:
        missing = ({self.task} | set(self.parent_accuracies)) - set(self.accuracies)
        if missing:
            raise ValueError(f"The report of {self.task!r} has no accuracy of {sorted(missing)}; evaluate every task.")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {
            "schema_version": SCHEMA_VERSION, "task": self.task, "accuracies": dict(self.accuracies),
            "parent_accuracies": dict(self.parent_accuracies), "base_accuracy": self.base_accuracy,
            "parent_accuracy_new_task": self.parent_accuracy_new_task, "num_rows": dict(self.num_rows),
            "matrix": self.matrix.to_json(), "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvaluationReport:
        """The report that `to_json` wrote.

        Raises:
            ValueError: another schema version.
        """
        fields = dict(data)
        if (version := fields.pop("schema_version", None)) != SCHEMA_VERSION:
            raise ValueError(f"The evaluation report has schema version {version}; this release reads "
                             f"{SCHEMA_VERSION}. Use the release that wrote it.")
        fields["matrix"] = AccuracyMatrix.from_json(fields["matrix"])
        fields["notes"] = tuple(fields["notes"])
        return cls(**fields)


@dataclass(frozen=True)
class GateDecision:
    """Whether a version may become champion, and if not, every reason why."""

    accepted: bool
    reasons: tuple[str, ...]


def decide(report: EvaluationReport, config: GateConfig) -> GateDecision:
    """Hold a version against its thresholds. All of them are checked, so that one run tells every reason.

    Example:
        >>> matrix = AccuracyMatrix().with_row("a", {"a": 0.5}, base_accuracy=0.45, parent_accuracy=None)
        >>> report = EvaluationReport(task="a", accuracies={"a": 0.5}, parent_accuracies={}, base_accuracy=0.45,
        ...                           parent_accuracy_new_task=None, num_rows={"a": 100}, matrix=matrix)
        >>> decide(report, GateConfig(min_gain_points=10)).reasons
        ("a: accuracy 50.0 % is below the floor of 55.0 % (base model's 45.0 % + 10.0 points).",)
    """
    reasons: list[str] = []
    accuracy = report.accuracies[report.task]
    floor = min(1.0, report.base_accuracy + config.min_gain_points / 100)
    if accuracy < floor - _SLACK:
        reasons.append(f"{report.task}: accuracy {_percent(accuracy)} is below the floor of {_percent(floor)} "
                       f"(base model's {_percent(report.base_accuracy)} + {config.min_gain_points:.1f} points).")
    if config.min_accuracy is not None and accuracy < config.min_accuracy - _SLACK:
        reasons.append(f"{report.task}: accuracy {_percent(accuracy)} is below the floor of "
                       f"{_percent(config.min_accuracy)}.")
    for task, before in report.parent_accuracies.items():
        drop = 100 * (before - report.accuracies[task])
        if drop > config.max_drop_points + 100 * _SLACK:
            reasons.append(f"{task}: accuracy fell by {drop:.1f} points, from {_percent(before)} to "
                           f"{_percent(report.accuracies[task])}; the limit is {config.max_drop_points:.1f} points.")
    return GateDecision(accepted=not reasons, reasons=tuple(reasons))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
