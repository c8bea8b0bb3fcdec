"""The checks of ingest alone, for a file that has not landed yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deal_core.data.arrival import ValidationReport
from deal_core.data.validate import validate_file
from infra.settings import TrackingSettings
from infra.tracking.registry import open_registry
from tasks.adaptation.ingest import choose_schema, frozen_test_inputs
from tasks.context import current_store, local_file
from tasks.lineage.record import read_record
from tasks.lineage.resolve_spec import spec_from_options
from tasks.lineage.versions import version_ref
from tasks.references import Arrival, VersionRef


class RefusedRow(BaseModel):
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
    bad_rows: tuple[RefusedRow, ...]
    """The first ones."""
    sha256: str


def validate(
    file: Path,
    *,
    spec: Path | None,
    task: str,
    lineage: str | None = None,
    test_data: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ValidateResult:
    """Check a file as ingest would: with the labels and the test rows that the lineage knows the task by.

    Whatever the spec says of texts, the result shows them: it goes to who holds the file, and nowhere else.

    Args:
        file: the file.
        spec: a spec whose task, test file and data settings apply, over the lineage's; its own data file is not read.
        task: name of the task, where there is no spec.
        lineage: instead of the spec's.
        test_data: file of test rows, instead of the spec's.
        on_progress: called now and then with the number of rows read.

    Raises:
        DataValidationError: the file cannot be read to its end.
        ConfigError: the task's name does not fit, or the spec says other things of the task than the lineage knows.
    """
    arrival_options = {"task": None, "data": None} if spec else {"task": task, "data": str(file)}
    read = spec_from_options(current_store(), spec, **arrival_options, test_data=None, lineage=lineage)
    test_data = test_data or read.task.test_data
    champion = known_champion(read.lineage)
    record = read_record(current_store(), champion.adapter_uri) if champion else None
    arrival = Arrival(task=read.task.name, data=str(file), test_data=test_data, given=read.task.given())
    schema = choose_schema(current_store(), arrival, record)
    with _local(test_data) as test_source:
        report = validate_file(
            file,
            schema,
            replace(read.data, include_texts=True),
            test_source=test_source,
            frozen_test_inputs=frozen_test_inputs(current_store(), record, read.task.name),
            on_progress=on_progress,
        )
    return _result(file, report)


def known_champion(lineage: str) -> VersionRef | None:
    """The lineage's champion; None where there is none. No registry is made to find that out."""
    address = TrackingSettings().tracking_uri
    if address.startswith("sqlite:///") and not Path(address.removeprefix("sqlite:///")).is_file():
        return None
    champion = open_registry().champion(lineage)
    return version_ref(champion) if champion else None


@contextmanager
def _local(address: str | None) -> Iterator[Path | None]:
    if address is None:
        yield None
        return
    with local_file(current_store(), address) as path:
        yield path


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
            RefusedRow(
                row=bad.row, line=bad.line, reasons=tuple(f"{reason}: {value}" for reason, value in bad.problems)
            )
            for bad in report.bad_rows
        ),
        sha256=manifest.sha256,
    )
