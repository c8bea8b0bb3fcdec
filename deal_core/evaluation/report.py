"""What was found of a new adapter version: the gate's evidence, and the report's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from deal_core.evaluation.metrics import KeptMatrix
from deal_core.evaluation.significance import PairedDrop
from deal_core.schema_version import Kept, VersionedJson


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What can be said of an adapter without asking it anything."""

    norm: float | None
    """‖ΔW‖, over all modules; None where a factor is not finite."""
    parent_norm: float | None
    """That of the version it continues; None for the first."""
    is_changed: bool
    """Whether its bytes differ from those of the version it continues."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(VersionedJson):
    """What one adapter version can do, beside its parent and the untouched base. Accuracies are shares, 0 to 1."""

    kept: ClassVar[Kept] = Kept("The evaluation report", ValueError, version=2, reads=(1, 2))
    """What 2 has more than 1 may be missing."""

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
    matrix: KeptMatrix
    """The lineage's matrix, with the new version as its last row."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know, such as a full adapter."""
    outcomes: Mapping[str, str] = field(default_factory=dict)
    """The new version's outcome on each test row of a task, 1 where it was right, else 0."""
    parent_outcomes: Mapping[str, str] = field(default_factory=dict)
    """Its parent's, on the same rows; a task whose outcomes were not kept is missing."""
    perplexity: float | None = None
    """Of plain English that no task is about; None where the model cannot tell it."""
    base_perplexity: float | None = None
    """The untouched base model's."""
    adapter: AdapterFacts | None = None
    """None: not looked at."""
    majority_rate: float | None = None
    """What always giving the commonest answer would score on the task, 0 to 1; None: not counted."""

    def __post_init__(self) -> None:
        missing = ({self.task} | set(self.parent_accuracies)) - set(self.accuracies)
        if missing:
            raise ValueError(f"The report of {self.task!r} has no accuracy of {sorted(missing)}; evaluate every task.")

    def paired_drop(self, task: str) -> PairedDrop | None:
        """What the new version lost of its parent's right answers; None where the parent's were not kept."""
        if task not in self.parent_outcomes or task not in self.outcomes:
            return None
        return PairedDrop.of(self.parent_outcomes[task], self.outcomes[task])
