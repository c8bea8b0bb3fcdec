"""References that the stages of a run pass to each other: small, frozen and JSON-able.

A `uri` is relative to the root of the object store, so a store can be moved.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from deal_core.config import AdapterConfig, Quantize
from deal_core.data.schema import TaskSchema
from deal_core.judging_config import RolloutTerms
from infra.store.keys import short_run

Standing = Literal[
    "learned",
    "awaiting approval",
    "in rollout",
    "left behind",
    "rejected by the gate",
    "rejected by a person",
    "rejected by its rollout",
]
"""left behind: accepted, but not an ancestor of the champion, because the lineage was rolled back or moved past it.

A version awaits approval only while its parent is champion."""

Spared = Literal["labelled", "all"] | None
"""The tasks of which some test rows do not judge, because their texts may teach a version; None: no task."""


class Reference(BaseModel, frozen=True, extra="forbid"):
    """Base class of the references."""


class BaseRef(Reference):
    """A base model: its source, and the digest of its files. A lineage keeps one base model."""

    source: str
    name: str
    sha256: str
    quantize: Quantize = "none"
    """Quantization of the linear layers. The digest does not depend on it."""


class Arrival(Reference):
    """What landed for a task and is learned at once: a file, a folder, or several of them."""

    task: str
    data: str | tuple[str, ...]
    """Local path, or a full uri in the store; see `tasks.data_files.local_files`."""
    test_data: str | tuple[str, ...] | None = None
    given: dict[str, Any] = {}
    """Fields of the task's schema that the user gave."""


class DatasetRef(Reference):
    """The dataset of an arrival in the store (`datasets/TASK/SHA256/LINEAGE/SCHEMA`)."""

    task: str
    uri: str
    sha256: str
    num_train: int
    num_test: int
    num_rejected: int
    quarantine: str | None = None
    """Key of the file with the bad rows; None: there are no bad rows."""
    landed_sha256: str
    """As `DatasetManifest.landed_sha256`."""
    new_labels: tuple[str, ...] = ()
    """Labels that were added by command and that the task lacks in the parent version."""
    renews_tests: bool = False
    """Whether `deal tests renew` had asked for new test rows when the rows were checked."""
    warnings: tuple[str, ...] = ()
    """What is odd about the rows together, without a text of them."""

    def widen(self, schema: TaskSchema) -> TaskSchema:
        """Add the new labels to the schema of the dataset's task; other schemas stay as they are."""
        return schema.with_labels(self.new_labels) if schema.name == self.task else schema


class AdapterRef(Reference):
    """A plain PEFT folder in the store (`adapters/LINEAGE/RUN`)."""

    lineage: str
    run_key: str
    uri: str
    sha256: str
    """As `VersionFacts.adapter_sha256`."""
    files_sha256: dict[str, tuple[str, ...]]
    """As `VersionFacts.files_sha256`."""
    parent_version: str | None = None


class VersionRef(Reference):
    """A registered version: its adapter and the gate's decision."""

    lineage: str
    version: str
    run_key: str
    adapter_uri: str
    adapter_sha256: str
    files_sha256: dict[str, tuple[str, ...]]
    """As `VersionFacts.files_sha256`."""
    accepted: bool
    reasons: tuple[str, ...] = ()
    parent_version: str | None = None
    approval: Literal["awaiting", "given", "refused"] | None = None
    """State of a person's approval; None: no approval is needed."""
    rollout: RolloutTerms | None = None
    """How the version is tried on live traffic before it becomes champion; None: it is not."""
    standing: Standing | None = None
    """The present state of the version; None: not looked up."""

    @property
    def outcome(self) -> Literal["promoted", "rejected", "awaiting-approval", "rollout"]:
        """How the version's run ended."""
        if not self.accepted or self.approval == "refused":
            return "rejected"
        if self.approval == "awaiting":
            return "awaiting-approval"
        return "promoted" if self.rollout is None else "rollout"


class RunRef(Reference):
    """An adaptation run: its key and its MLflow run."""

    lineage: str
    task: str
    run_key: str
    tracking_id: str

    @property
    def short_key(self) -> str:
        """The part of the key that folder names use."""
        return short_run(self.run_key)


class ArrivalScore(Reference):
    """The champion's accuracy on the rows of an arrival, before anything was trained on them."""

    accuracy: float
    """Mean score of the rows by the task's metric, 0 to 1."""
    num_rows: int
    """Rows that were asked."""
    of_rows: int
    """Training rows of the arrival."""

    def describe(self) -> str:
        """Return it in a few words."""
        rows = (
            f"{self.num_rows} new rows"
            if self.num_rows == self.of_rows
            else (f"{self.num_rows} of {self.of_rows} new rows")
        )
        return f"champion scored {100 * self.accuracy:.1f} % on {rows}"


class AdaptationJob(Reference):
    """The inputs of an adaptation run, for the stages from training to registration."""

    run: RunRef
    base: BaseRef
    parent: VersionRef | None
    dataset: DatasetRef
    adapter: AdapterConfig
    """Shape of the lineage's adapter."""
    strategy: str
    config_sha256: str
    """Digest of all settings that can change the result."""
    spared: Spared = None
    tested: ArrivalScore | None = None
    """The champion's score on the arrival's rows; None: it was not asked."""


class TrainSummary(Reference):
    """Figures of a training, kept in the work folder until the run is registered."""

    adapter_sha256: str
    num_rows: int
    """Training rows that were learned from, after `selection` has chosen."""
    num_steps: int
    seconds: float
    rows_per_second: float
    losses: tuple[tuple[int, float], ...]
    resumed_from_step: int | None = None
    fill: dict[str, float] = {}
    notes: tuple[str, ...] = ()


class TrainedAdapter(Reference):
    """The result of the train stage."""

    adapter: AdapterRef
    summary: TrainSummary


class VersionScores(Reference):
    """New accuracies of a version, the accuracies of its own run, and the number of test rows, by task."""

    accuracies: dict[str, float]
    recorded: dict[str, float]
    num_rows: dict[str, int]
    unjudged: dict[str, str] = {}
    """Tasks that could not be judged, with the reason."""
