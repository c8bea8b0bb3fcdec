"""The checks of ingest alone, for a file that has not landed yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deal_core.data.arrival import ValidationReport
from deal_core.data.validate import validate_file
from flows.spec import AdaptSpec, TaskSpec, read_spec
from tasks.ingest import choose_schema
from tasks.references import Arrival


class BadRow(BaseModel):
    """One row that would go to quarantine."""

    model_config = ConfigDict(frozen=True)

    row: int
    line: int | None
    reasons: tuple[str, ...]


class ValidateResult(BaseModel):
    """What the checks say of a file."""

    model_config = ConfigDict(frozen=True)

    file: str
    accepted: bool
    refusal: str | None
    format: str
    labels: tuple[str, ...]
    num_read: int
    num_train: int
    num_test: int
    num_rejected: int
    problems: dict[str, int]
    bad_rows: tuple[BadRow, ...]
    """The first ones."""
    sha256: str


def validate(
    file: Path, *, spec: Path | None, task: str, on_progress: Callable[[int], None] | None = None
) -> ValidateResult:
    """Check a file as ingest would.

    Args:
        file: the file.
        spec: a spec whose task and data settings apply; its own data file is not read.
        task: name of the task, where there is no spec.
        on_progress: called now and then with the number of rows read.

    Raises:
        DataValidationError: the file cannot be read to its end.
    """
    read = read_spec(spec) if spec else AdaptSpec(task=TaskSpec(name=task, data=str(file)))
    arrival = Arrival(task=read.task.name, data=str(file), given=read.task.given())
    report = validate_file(file, choose_schema(arrival, None), read.data, on_progress=on_progress)
    return _result(file, report)


def _result(file: Path, report: ValidationReport) -> ValidateResult:
    manifest = report.manifest
    return ValidateResult(
        file=str(file),
        accepted=report.refusal is None,
        refusal=report.refusal,
        format=manifest.task.format,
        labels=manifest.task.labels,
        num_read=manifest.num_read,
        num_train=manifest.num_train,
        num_test=manifest.num_test,
        num_rejected=manifest.num_rejected,
        problems=dict(manifest.problems),
        bad_rows=tuple(
            BadRow(row=bad.row, line=bad.line, reasons=tuple(f"{reason}: {value}" for reason, value in bad.problems))
            for bad in report.bad_rows
        ),
        sha256=manifest.sha256,
    )
