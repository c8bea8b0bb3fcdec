"""References that the stages of a run pass to each other: small, frozen and JSON-able.

A `uri` is relative to the root of the object store, so a store can be moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field

from deal_core.config import Quantize
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.arrival_check import ArrivalScore
from infra.report.run_report import Training


class Reference(BaseModel, frozen=True, extra="forbid"):
    """Base class of the references."""


class BaseRef(Reference):
    """A base model: its source, and the digest of its files. A lineage keeps one base model."""

    source: str
    name: str
    sha256: str
    quantize: Quantize = "none"
    """Quantization of the linear layers. The digest does not depend on it."""


class DatasetRef(Reference):
    """The dataset of an arrival in the store (`datasets/TASK/SHA256/LINEAGE/SCHEMA`)."""

    task: str
    uri: str
    """Its folder, relative to the store."""
    sha256: str
    num_train: int
    num_test: int
    num_added: int = 0
    """Test rows with new texts, which are added to those of a known task."""
    num_rejected: int
    """Bad rows, which were left out."""
    quarantine: str | None = None
    """Key of the file with the bad rows; None: there are no bad rows."""
    landed_sha256: str
    """Digest of the task's name and the good rows, independent of the lineage's test rows."""
    new_labels: tuple[str, ...] = ()
    """Labels that were added by command and that the task lacks in the parent version."""
    renews_tests: bool = False
    """Whether `deal task renew-tests` had asked for new test rows when the rows were checked."""
    warnings: tuple[str, ...] = ()
    """What is odd about the rows together, without a text of them."""

    def widen(self, schema: TaskSchema) -> TaskSchema:
        """Add the new labels to the schema of the dataset's task; other schemas stay as they are."""
        return schema.with_labels(self.new_labels) if schema.name == self.task else schema


class Contradiction(Reference):
    """A row of an arrival that the champion answers otherwise, and is sure of its answer."""

    sha256: str
    """Digest of the row."""
    file: str | None = None
    row: int | None = None
    """Number of the row in its file, from 1, without a CSV's header; None: the file is gone."""
    text: str | None = None
    """None: texts may not be shown."""
    label: str | None = None
    """The right answer, as the row says."""
    answer: str | None = None
    """The champion's answer."""

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"row {self.row} of {self.file}"

    @property
    def without_texts(self) -> Self:
        """The row by its place alone."""
        return self.model_copy(update={"text": None, "label": None, "answer": None})


class ScoredArrival(Reference):
    """What the champion answered to an arrival before anything was trained on it."""

    version: str
    """Number of the champion."""
    score: ArrivalScore
    scores: tuple[float, ...] = Field(default=(), exclude=True, repr=False)
    """The score of each row that was asked."""
    has_labels: bool
    contradictions: tuple[Contradiction, ...] = ()
    """If the labels disagree: the rows whose label the champion contradicts most surely."""

    @property
    def sentence(self) -> str:
        """What was found, in a sentence."""
        return self.score.sentence(self.version, has_labels=self.has_labels)


class TrainSummary(Training):
    """Figures of a training, kept in the work folder until the run is registered."""

    adapter_sha256: str
    fill: Mapping[str, float] = {}
    notes: tuple[str, ...] = ()
    launch: str = "local"
    """What started its processes, as DEAL_LAUNCH."""
    shard: str = "none"
    """What they shared of the base model, as DEAL_SHARD."""


class TrainedAdapter(Reference):
    """The result of the train stage: a plain PEFT folder, on this machine and in the store."""

    folder: Path
    uri: str
    """Its folder in the store (`adapters/LINEAGE/RUN`)."""
    sha256: str
    """Digest of all files together; see `sha256_together`."""
    summary: TrainSummary


class VersionScores(Reference):
    """New accuracies of a version, the accuracies of its own run, and the number of test rows, by task."""

    accuracies: dict[str, float]
    """Task → accuracy now."""
    recorded: dict[str, float]
    """Task → accuracy in the version's own run."""
    num_rows: dict[str, int]
    """Task → number of its test rows."""
    unjudged: dict[str, str] = {}
    """Tasks that could not be judged, with the reason."""
