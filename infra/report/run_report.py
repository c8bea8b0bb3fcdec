"""What a run's page needs beside the version and `evaluation.json`. The store keeps it as `report.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deal_core.errors import RegistryError
from deal_core.schema_version import require_schema_version

REPORT_FILE = "report.json"
EVALUATION_FILE = "evaluation.json"
LIVE_FILE = "live.json"
"""The last look at the version's live traffic."""
PAGE_FILE = "report.html"


class ReportPart(BaseModel):
    """Base of all parts: immutable and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(ReportPart):
    """A test row. The texts are None unless the run may show them."""

    row: str
    """The row's digest (SHA-256) in the dataset."""
    text: str | None = None
    expected: str | None = None
    before: str | None = None
    """The answer of the version before."""
    now: str | None = None
    """The answer of this version."""
    scores: tuple[float, float]
    """The scores of both answers, 0 to 1."""


class Changed(ReportPart):
    """The test rows of a task whose answers became right or wrong, or whose scores changed by 0.1 or more."""

    task: str
    metric: str = "exact"
    num_rows: int
    num_gained: int
    num_lost: int
    gained: tuple[Example, ...]
    """The first gained rows."""
    lost: tuple[Example, ...]
    """The first lost rows."""


class QuarantinedRow(ReportPart):
    """A row in quarantine."""

    file: str
    row: int
    line: int | None
    problems: tuple[str, ...]
    """Reasons, each with the bad value if the run may show texts."""


class Quality(ReportPart):
    """The result of validation; only numbers of rows if the arrival was forgotten before its page was written."""

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
    """Key of the bad rows in the object store."""
    bad_rows: tuple[QuarantinedRow, ...] = ()
    """The first bad rows."""
    warnings: tuple[str, ...] = ()
    """What is odd about the rows together; with texts only if the run may show them."""


class Training(ReportPart):
    """Figures of a training."""

    num_rows: int
    """Training rows that were learned from, after `selection` has chosen."""
    num_steps: int
    seconds: float
    rows_per_second: float
    resumed_from_step: int | None = None
    losses: tuple[tuple[int, float], ...]
    """Step and loss; on a page long series are thinned out."""
    validation_losses: tuple[tuple[int, float], ...] = ()
    """Step and loss of the rows that were held back for validation; empty: there were none."""
    kept_step: int | None = None
    """The step that validation chose; None: the last one, without validation."""


class RunReport(ReportPart):
    """The values of a run's page that neither its version nor `evaluation.json` has."""

    schema_version: Literal[1] = 1
    include_texts: bool
    training: Training
    quality: Quality
    changed: tuple[Changed, ...]
    seconds: dict[str, float]
    """Wall time of each stage; after a crash, only of the known stages."""
    base: str
    """Name of the base model."""
    libraries: dict[str, str]
    """Versions of the libraries that trained."""

    @classmethod
    def from_json(cls, values: Any) -> RunReport:
        """Read the result of `model_dump(mode="json")`; raise RegistryError if it does not fit."""
        require_schema_version(values, 1, REPORT_FILE, RegistryError)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RegistryError(f"{REPORT_FILE} is damaged: {error.error_count()} of its values do not fit.") from None
