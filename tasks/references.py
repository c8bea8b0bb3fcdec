"""What the stages of a run hand to each other: small frozen references, never frames, models or clients.

A `uri` is relative to the root of the object store, so that a store can be moved or read from elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from deal_core.config import AdapterConfig, Quantize
from deal_core.data.schema import TaskSchema

Standing = Literal["learned", "awaiting approval", "left behind", "rejected by the gate", "rejected by a person"]
"""left behind: accepted, but not in the champion's descent, as the lineage was rolled back or went on without it.

Of those that need approval only one that continues the champion still awaits it."""


class Reference(BaseModel):
    """Base of all references: immutable, JSON-able, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseRef(Reference):
    """A base model: how to load it, and the hash of its weights that a lineage is bound to."""

    source: str
    name: str
    sha256: str
    quantize: Quantize = "none"
    """How its linear layers are held, which the hash knows nothing of."""


class Arrival(Reference):
    """A file that landed for a task, with what is known of the task's rows."""

    task: str
    data: str
    """Local path, or a full uri inside the store."""
    test_data: str | None = None
    given: dict[str, Any] = {}
    """Fields of the task's schema that the user gave."""


class DatasetRef(Reference):
    """A validated arrival in the store (`datasets/<task>/<sha256>/<lineage>/<digest of the task's schema>`)."""

    task: str
    uri: str
    sha256: str
    num_train: int
    num_test: int
    num_rejected: int
    quarantine: str | None = None
    """Key of the file's bad rows; None if it had none."""
    landed_sha256: str | None = None
    """As in the manifest."""
    new_labels: tuple[str, ...] = ()
    """Labels, added by command, that its task lacks in the version that the run continues."""

    def widen(self, schema: TaskSchema) -> TaskSchema:
        """How a task is asked once the dataset is learned: its own has the new labels too."""
        return schema.with_labels(self.new_labels) if schema.name == self.task else schema


class AdapterRef(Reference):
    """A plain PEFT folder in the store (`adapters/<lineage>/<run>`)."""

    lineage: str
    run_key: str
    uri: str
    sha256: str
    parent_version: str | None = None


class VersionRef(Reference):
    """A registered adapter version: where its folder is and what the gate said of it."""

    lineage: str
    version: str
    run_key: str
    adapter_uri: str
    adapter_sha256: str
    files_sha256: dict[str, tuple[str, ...]] | None = None
    """As `VersionFacts.files_sha256`."""
    accepted: bool
    reasons: tuple[str, ...] = ()
    parent_version: str | None = None
    approval: Literal["awaiting", "given", "refused"] | None = None
    """Whether a person has to agree, or has; None: nobody was asked."""
    standing: Standing | None = None
    """What has become of it since; None: not looked at."""

    @property
    def outcome(self) -> Literal["promoted", "rejected", "awaiting-approval"]:
        """How its run ended."""
        if not self.accepted or self.approval == "refused":
            return "rejected"
        return "awaiting-approval" if self.approval == "awaiting" else "promoted"


class RunRef(Reference):
    """One adaptation run: its identity and the MLflow run that belongs to it."""

    lineage: str
    task: str
    run_key: str
    tracking_id: str

    @property
    def short_key(self) -> str:
        """The part of the key that names folders."""
        return self.run_key[:16]


class AdaptationJob(Reference):
    """What one adaptation run works on; the stages from training to registration share it."""

    run: RunRef
    base: BaseRef
    parent: VersionRef | None
    dataset: DatasetRef
    adapter: AdapterConfig
    """Shape of the lineage's adapter."""
    strategy: str
    config_sha256: str
    """Digest of every setting that decides the result."""


class TrainSummary(Reference):
    """What training reports of itself; kept beside the adapter until the run is registered."""

    adapter_sha256: str
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
    """Fresh accuracies of a version, those of its own run, and how many rows they are of, by task."""

    accuracies: dict[str, float]
    recorded: dict[str, float]
    num_rows: dict[str, int]
    unjudged: dict[str, str] = {}
    """Why a task could not be judged."""
