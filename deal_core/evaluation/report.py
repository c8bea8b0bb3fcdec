"""Results of evaluating a new version, for the gate and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deal_core.evaluation.metrics import AccuracyMatrix
from deal_core.evaluation.significance import PairedDrop
from deal_core.schema_version import require_schema_version

SCHEMA_VERSION = 2
_READ_VERSIONS = (1, 2)
"""Fields that version 2 added may be missing."""


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """Facts about an adapter that need no answers."""

    norm: float | None
    """‖ΔW‖ over all modules; None if a factor is not finite."""
    parent_norm: float | None
    """The parent's norm; None for the first version."""
    is_changed: bool
    """Whether the adapter's bytes differ from the parent's."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Scores of one version, its parent and the untouched base. Accuracies are shares, 0 to 1."""

    task: str
    """The task that the version was trained on."""
    accuracies: Mapping[str, float]
    """The new version's accuracy on every task of the lineage."""
    parent_accuracies: Mapping[str, float]
    """The parent's accuracy on every task it had learned, including a repeated `task`; empty for the first version."""
    base_accuracy: float
    """The untouched base model's accuracy on the task."""
    parent_accuracy_new_task: float | None
    """The parent's accuracy on the task before training; None for the first version."""
    num_rows: Mapping[str, int]
    """Test rows of each task."""
    matrix: AccuracyMatrix
    """The lineage's matrix, with the new version as its last row."""
    notes: tuple[str, ...] = ()
    """Remarks for readers of the figures, such as a full adapter."""
    outcomes: Mapping[str, str] = field(default_factory=dict)
    """Per task, the new version's outcome on each test row: 1 for right, else 0."""
    parent_outcomes: Mapping[str, str] = field(default_factory=dict)
    """The parent's outcomes on the same rows; a task whose outcomes were not kept is missing."""
    perplexity: float | None = None
    """Perplexity of plain English that belongs to no task; None if the model has none (an encoder-decoder)."""
    base_perplexity: float | None = None
    """The untouched base model's perplexity."""
    adapter: AdapterFacts | None = None
    """None: not examined."""
    majority_rate: float | None = None
    """Accuracy of always giving the most common answer of the task, 0 to 1; None: not counted."""

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
            "matrix": self.matrix.to_json(), "notes": list(self.notes), "outcomes": dict(self.outcomes),
            "parent_outcomes": dict(self.parent_outcomes), "perplexity": self.perplexity,
            "base_perplexity": self.base_perplexity, "adapter": self.adapter and asdict(self.adapter),
            "majority_rate": self.majority_rate,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvaluationReport:
        """The report that `to_json` wrote.

        Raises:
            ValueError: another schema version.
        """
        fields = require_schema_version(data, _READ_VERSIONS, "The evaluation report", ValueError)
        fields["matrix"] = AccuracyMatrix.from_json(fields["matrix"])
        fields["notes"] = tuple(fields["notes"])
        if fields.get("adapter"):
            fields["adapter"] = AdapterFacts(**fields["adapter"])
        return cls(**fields)

    def paired_drop(self, task: str) -> PairedDrop | None:
        """The new version's drop against its parent on a task; None if outcomes were not kept."""
        if task not in self.parent_outcomes or task not in self.outcomes:
            return None
        return PairedDrop.of(self.parent_outcomes[task], self.outcomes[task])
