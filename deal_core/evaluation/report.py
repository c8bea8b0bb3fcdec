"""Results of evaluating a new version, for the gate and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

from deal_core.evaluation.accuracy_matrix import StoredMatrix
from deal_core.evaluation.metrics import LabelFigures, metric_name
from deal_core.evaluation.significance import PairedDrop
from deal_core.schema_version import VersionedJson


def outcome_text(scores: Sequence[float]) -> str | list[float]:
    """Scores as JSON: a text of one character per row if all are 0 or 1, else a list of numbers."""
    if all(score in (0.0, 1.0) for score in scores):
        return "".join(str(int(score)) for score in scores)
    return [round(score, 6) for score in scores]


Scores = Annotated[
    tuple[float, ...],
    BeforeValidator(lambda value: tuple(map(float, value)) if isinstance(value, str) else value),
    PlainSerializer(outcome_text),
]
"""The score of every test row of a task, 0 to 1."""


def mean_score(scores: Sequence[float]) -> float:
    """Return the mean of scores, of which there is one at least."""
    return sum(scores) / len(scores)


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
class GeneralScores:
    """The scores of each row of a suite of general ability."""

    now: Scores
    """The new version's."""
    base: Scores
    """The untouched base model's."""
    parent: Scores | None
    """The parent's; None for the first version."""


@dataclass(frozen=True)
class Debt:
    """What a task has lost since it was learned, over the whole chain of versions."""

    since: str
    """Number of the version that it counts from: the best of those that learned the task."""
    points: float
    """Points of accuracy; below 0: a gain."""
    paired: PairedDrop | None
    """The loss row by row; None: that version's answers are not kept, and `points` is of the accuracy matrix."""


@dataclass(frozen=True, kw_only=True)
class AddedRows:
    """The test rows that a version adds to those of its task, and its score on them, 0 to 1.

    They judge from the next version on: wrong labels cannot judge the version that learned them.
    """

    num_rows: int
    accuracy: float
    parent_accuracy: float
    base_accuracy: float


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(VersionedJson, what="The evaluation report", error=ValueError, version=4):
    """Scores of one version, its parent and the untouched base.

    An accuracy is the mean score of a task's test rows by the task's metric, 0 to 1.
    """

    task: str
    """The task that the version was trained on; of a consolidation the task that its parent learned last."""
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
    matrix: StoredMatrix
    """The lineage's matrix, with the new version as its last row."""
    notes: tuple[str, ...] = ()
    """Remarks for readers of the figures, such as a full adapter."""
    outcomes: Mapping[str, Scores] = field(default_factory=dict)
    """Per task, the new version's score on each test row."""
    parent_outcomes: Mapping[str, Scores] = field(default_factory=dict)
    """The parent's scores on the same rows; a task whose scores were not kept is missing."""
    perplexity: float | None = None
    """Perplexity of plain English that belongs to no task; None if the model has none (an encoder-decoder)."""
    base_perplexity: float | None = None
    base_divergence: float | None = None
    """KL(base ‖ version) in nats per answer token on test rows of `task`; None: not measured."""
    general: Mapping[str, GeneralScores] = field(default_factory=dict)
    """Per suite of general ability that is on, its scores."""
    adapter: AdapterFacts | None = None
    """None: not examined."""
    majority_rate: float | None = None
    """Score of always giving the most common answer of the task, 0 to 1; None: not counted."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Each task's metric; a missing task has "exact"."""
    slices: Mapping[str, str] = field(default_factory=dict)
    """Earlier test rows of a task whose test rows were renewed: the slice's name → the task. A slice has figures of its
    own under its name."""
    labels: Mapping[str, tuple[LabelFigures, ...]] = field(default_factory=dict)
    """Per labelled task, the new version's recall and share of answers of each label."""
    debts: Mapping[str, Debt] = field(default_factory=dict)
    """For each task that an ancestor learned, what it has lost since."""
    added: AddedRows | None = None
    """Test rows that the version adds to those of `task`; no other figure is of them."""
    is_consolidation: bool = False
    """Whether the version learned all tasks together, so that no task is its own."""

    def __post_init__(self) -> None:
        missing = ({self.task} | set(self.parent_accuracies)) - set(self.accuracies)
        if missing:
            raise ValueError(f"The report of {self.task!r} has no accuracy of {sorted(missing)}; evaluate every task.")

    @property
    def base_accuracy_on_new_rows(self) -> float:
        """The untouched base model's accuracy on the newest test rows of the task."""
        return self.base_accuracy if self.added is None else self.added.base_accuracy

    def metric_name(self, task: str) -> str:
        """Name of a task's metric for people."""
        return metric_name(self.metrics.get(self.slices.get(task, task), "exact"))

    def paired_drop(self, task: str) -> PairedDrop | None:
        """The new version's drop against its parent on a task; None if outcomes were not kept."""
        if task not in self.parent_outcomes or task not in self.outcomes:
            return None
        return PairedDrop.of(self.parent_outcomes[task], self.outcomes[task])
