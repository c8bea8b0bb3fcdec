"""What a run's page is made of, beside the evaluation: plain values that MLflow keeps as `report.json`."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deal_core.errors import RegistryError
from deal_core.schema_version import require_schema_version

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"

Verdict = Literal["promoted", "rejected", "awaiting-approval"]


class ReportPart(BaseModel):
    """Base of all parts: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(ReportPart):
    """One test row; texts are there only if the run was allowed to show them."""

    row: str
    """Its digest (sha256), as the dataset has it."""
    text: str | None = None
    expected: str | None = None
    before: str | None = None
    """The answer of the version before."""
    now: str | None = None
    """The answer of this version."""


class Changed(ReportPart):
    """The test rows of one task whose answers became right or wrong."""

    task: str
    num_rows: int
    num_gained: int
    num_lost: int
    gained: tuple[Example, ...]
    """The first ones."""
    lost: tuple[Example, ...]
    """The first ones."""


class QuarantinedRow(ReportPart):
    """One row in quarantine."""

    file: str
    row: int
    line: int | None
    problems: tuple[str, ...]
    """Reasons, each with the value that shows it if texts may be shown."""


class Quality(ReportPart):
    """What validation said of the arrival; only numbers of rows where it was forgotten before its page was written."""

    source: str | None = None
    """Name of the file that landed."""
    format: str | None = None
    split: str | None = None
    num_labels: int = 0
    num_read: int
    num_train: int
    num_test: int
    num_rejected: int
    problems: dict[str, int] = {}
    """Reason to number of problems."""
    quarantine: str | None = None
    """Key in the object store of the rows that were put aside."""
    bad_rows: tuple[QuarantinedRow, ...] = ()
    """The first ones."""


class Training(ReportPart):
    """How it was learned."""

    strategy: str
    num_steps: int
    seconds: float
    rows_per_second: float
    resumed_from_step: int | None
    losses: tuple[tuple[int, float], ...]
    """Step and loss; thinned out where there are very many."""
    fill: dict[str, float]
    """Module to the share of its slots in use."""


class Link(ReportPart):
    """One version of the lineage."""

    version: str
    task: str
    strategy: str
    parent_version: str | None
    accepted: bool
    average_accuracy: float | None
    forgetting: float | None


class Origin(ReportPart):
    """What the version is made of."""

    base: str
    base_sha256: str
    dataset_sha256: str
    adapter_sha256: str
    config_sha256: str
    run_key: str
    tracking_id: str
    libraries: dict[str, str]


class RunReport(ReportPart):
    """Everything that the page of a run shows and `evaluation.json` does not have."""

    schema_version: Literal[1] = 1
    lineage: str
    version: str
    task: str
    parent_version: str | None
    verdict: Verdict
    reasons: tuple[str, ...]
    created: datetime
    """When the version was registered."""
    include_texts: bool
    training: Training
    quality: Quality
    changed: tuple[Changed, ...]
    seconds: dict[str, float]
    """Stage to wall time; of a run that was completed after a crash only what is known."""
    lineage_so_far: tuple[Link, ...]
    origin: Origin

    @classmethod
    def from_json(cls, values: Any) -> RunReport:
        """The report that `model_dump(mode="json")` gave.

        Raises:
            RegistryError: it has another schema version, or is damaged.
        """
        require_schema_version(values, 1, REPORT_FILE, RegistryError)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RegistryError(f"{REPORT_FILE} is damaged: {error.error_count()} of its values do not fit.") from None
