"""From a landed file to a dataset: every row checked, bad rows in quarantine, good rows split for good."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from deal_core.config import DataConfig
from deal_core.data.arrival import ArrivalReader, ValidationReport
from deal_core.data.dataset_files import DatasetFiles, Quarantine
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.errors import DataValidationError


class ArrivalRefusedError(DataValidationError):
    """The arrival was read to its end and cannot be used."""

    def __init__(self, message: str, report: ValidationReport) -> None:
        super().__init__(message)
        self.report = report


def build_dataset(
    source: Path,
    task: TaskSchema,
    folder: Path,
    config: DataConfig,
    *,
    test_source: Path | None = None,
    frozen_test_inputs: Collection[bytes] = (),
    on_progress: Callable[[int], None] | None = None,
) -> DatasetManifest:
    """Check a landed file and write the dataset: train.parquet, test.parquet, manifest.json and quarantine.jsonl.

    Which rows are test rows is said by a test file, else by the column "split", else by the digests of their texts:
    by digest a text lands on the same side in every arrival, with whatever answer.

    Args:
        source: The landed file, see `read_rows`.
        task: The task; its format may be "auto", and a labelled task without labels gets those of the file.
        folder: Where the dataset is written. What an earlier call left there is replaced.
        config: Shares and limits.
        test_source: A file with the test rows; then `source` holds training rows only.
        frozen_test_inputs: Digests (`stored_input_digest`) of the texts that judge the task for good. No training row
            may have such a text, and of rows whose side nobody says these alone are test rows.
        on_progress: Called now and then with the number of rows read. The file is read twice where it names its split
            itself, or where the labels are taken from it.

    Returns:
        The manifest, with the task's format and labels filled in.

    Raises:
        ArrivalRefusedError: Too many bad rows, or no row to train on or to test with; quarantine.jsonl is written.
        DataValidationError: The file cannot be read, or not to its end.

    Example:
        >>> build_dataset(Path("tickets.csv"), TaskSchema(name="tickets"), Path("out"), DataConfig()).num_train
    """
    with DatasetFiles(folder) as files:
        arrival = ArrivalReader(source, test_source, task, config, frozen_test_inputs, on_progress)
        report = arrival.validate(files.add, files.quarantine.add)
        if report.refusal is not None:
            listed = f" Every bad row is listed in {files.quarantine.path}." if report.bad_rows else ""
            raise ArrivalRefusedError(report.refusal + listed, report)
        files.publish(report.manifest)
    return report.manifest


def validate_file(
    source: Path,
    task: TaskSchema,
    config: DataConfig,
    *,
    test_source: Path | None = None,
    frozen_test_inputs: Collection[bytes] = (),
    quarantine_file: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ValidationReport:
    """The checks of `build_dataset` alone; keeps no row, and reports a refusal instead of raising it.

    Bad rows are written to `quarantine_file` if one is named; the other arguments are those of `build_dataset`.

    Raises:
        DataValidationError: The file cannot be read, or not to its end.
    """
    arrival = ArrivalReader(source, test_source, task, config, frozen_test_inputs, on_progress)
    if quarantine_file is None:
        return arrival.validate(lambda rows, split: None, lambda bad, raw: None)
    with Quarantine(quarantine_file) as quarantine:
        return arrival.validate(lambda rows, split: None, quarantine.add)
