"""From a landed file to a dataset: check every row, quarantine bad rows, and split good rows permanently."""

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

    Test rows are decided by a test file, else by the column "split", else by the digests of the rows' texts. A text's
    digest puts it on the same side in every file, with any answer.

    Args:
        source: The landed file, see `read_rows`.
        task: The task; its format may be "auto", and a labelled task without labels gets the labels of the file.
        folder: Folder of the dataset; files of an earlier call are replaced.
        config: Shares and limits.
        test_source: A file with the test rows; `source` then holds only training rows.
        frozen_test_inputs: Digests (`stored_input_digest`) of the texts of the task's permanent test rows. Training
            rows with such a text are bad rows. If the file names no split, only rows with these texts are test rows.
        on_progress: Called from time to time with the number of rows read. The file is read twice if it names its
            split, or if the labels are taken from it.

    Returns:
        The manifest, with the task's format and labels filled in.

    Raises:
        ArrivalRefusedError: There are too many bad rows, no training row or no test row; quarantine.jsonl is written.
        DataValidationError: The file cannot be read to its end.

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
    """Only the checks of `build_dataset`: no row is kept, and a refusal is reported instead of raised.

    Bad rows are written to `quarantine_file` if it is given. The other arguments are those of `build_dataset`.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    arrival = ArrivalReader(source, test_source, task, config, frozen_test_inputs, on_progress)
    if quarantine_file is None:
        return arrival.validate(lambda rows, split: None, lambda bad, raw: None)
    with Quarantine(quarantine_file) as quarantine:
        return arrival.validate(lambda rows, split: None, quarantine.add)
