"""The keys of the object store. Every key is built and parsed in this file.

    format.json                               the format of the store, see `infra.store.format`
    inbox/TASK/FILE                           a file that landed; task.yaml describes the task
    inbox/TASK/FOLDER/FILE                    a file of a folder that landed
    datasets/TASK/SHA256/LINEAGE/SCHEMA/FILE  the checked rows of an arrival, and their manifest
    quarantine/TASK/SHA256/FILES.jsonl        the bad rows of an arrival
    quarantine/TASK/SHA256/FILES.files.json   the digests of its files, if it was refused and has several
    adapters/LINEAGE/RUN/FILE                 the adapter of a version, its record and its findings
    runs/LINEAGE/RUN.json                     the journal of an adaptation: its input, its state and its curves
    adapters/LINEAGE/RUN/jobs/KIND/...        a training or an evaluation on other machines, while it runs
    reports/LINEAGE/RUN/FILE                  the report of a run, as values; pages are made from it
    versions/LINEAGE/NUMBER.json              a version; beside it, what later replaced or removed its files
    promotions/LINEAGE/NUMBER.json            the promotion log
    branches/LINEAGE/NUMBER.json              what is made anew; NUMBER.judged.json and .end.json say how that went
    exports/LINEAGE/NUMBER/DIGEST.json        an export of a version
    index/FOLDER.json                         the content of a folder's objects, which saves requests
    base_models/SHA256.QUANTIZE.json          what the base model answers to a few texts, see `infra.fingerprints`
    base_models/SHA256.general.json           the scores of a base model on suites of general ability
    mlflow/LINEAGE.json                       what MLflow has of the lineage
    mlflow/LINEAGE/RUN.forget                 a run whose rows are still to be removed from MLflow
    lineages/LINEAGE.yaml                     the stored settings of a lineage
    lineages/LINEAGE.state.json               all that changes of a lineage, see `infra.lineage_state`
    arrivals/LINEAGE/YEAR.json                the arrivals of the inbox that ended in a year
    forgotten/TASK/SHA256.json                tombstones of forgotten arrivals
    deleted_inputs/TASK/SHA256.parquet        digests of the inputs of their rows
    predictions/LINEAGE/DAY/BATCH.parquet     the prediction log
    feedback/LINEAGE/DAY/BATCH.parquet        right answers to rows of the prediction log, or whether they were right
    harvests/LINEAGE/TASK.json                the feedback that has become rows of an arrival
    monitor/LINEAGE/VERSION.parquet           live rows that later looks compare with, as numbers only

SHA256 is the digest of an arrival's good rows, FILES the digests of its files, SCHEMA that of the task, RUN the first
part of a run's key. In the templates below, `{:.16}` is the first 16 characters of a part.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Sequence
from datetime import date, datetime
from typing import NamedTuple

INBOX = "inbox"
DATASETS = "datasets"
QUARANTINE = "quarantine"
ADAPTERS = "adapters"
VERSIONS = "versions"
PROMOTIONS = "promotions"
LINEAGES = "lineages"
ARRIVALS = "arrivals"
FORGOTTEN = "forgotten"
DELETED_INPUTS = "deleted_inputs"
PREDICTIONS = "predictions"
FEEDBACK = "feedback"

FORMAT_FILE = "format.json"
TASK_FILE = "task.yaml"
REFUSED_FILES = ".files.json"
"""End of the key of `refused_files_key`."""
SUCCESS_FILE = "_SUCCESS"
"""The file by which an engine says that a folder is complete."""
MANIFEST_FILE = "manifest.json"
TRAIN_FILE = "train.parquet"
TEST_FILE = "test.parquet"
INPUTS_FILE = "train.inputs"
"""The digests of the training rows' inputs, one after another: they stay when the rows are deleted."""
BATCH_TIME = "%Y%m%dT%H%M%S"
"""Form of the time (UTC) that the name of a log's batch begins with."""
BATCH_NAME = re.compile(r"\d{8}T\d{6}-.+\.parquet")

OfTask = Callable[[str], str]
"""From a task."""
OfRows = Callable[[str, str], str]
"""From a task and a digest."""
OfLineage = Callable[[str], str]
"""From a lineage."""
OfLineageAndTask = Callable[[str, str], str]
OfRun = Callable[[str, str], str]
"""From a lineage and the key of a run, of which the first part is enough."""
OfNumber = Callable[[str, int], str]
"""From a lineage and a number. The keys sort by number."""

inbox_folder: OfTask = "inbox/{}".format
dataset_folder: OfRows = "datasets/{}/{}".format
"""All datasets with the same rows."""
dataset_uri: Callable[[str, str, str, str], str] = "datasets/{}/{}/{}/{:.16}".format
"""One lineage's dataset, from the task, the digest of the rows, the lineage and the digest of the schema."""
quarantine_folder: OfRows = "quarantine/{}/{}".format
"""The bad rows of all arrivals with the same good rows."""
tombstone_key: OfRows = "forgotten/{}/{}.json".format
"""From the digest of a dataset or of a file."""
deleted_inputs_key: OfRows = "deleted_inputs/{}/{}.parquet".format

adapters_folder: OfLineage = "adapters/{}".format
adapter_uri: Callable[[str, str], str] = "adapters/{}/{}".format
"""The adapter that a run made, from the lineage and the first part of the run's key."""
run_folder: OfLineage = "runs/{}".format
run_journal_key: OfRun = "runs/{}/{:.16}.json".format
jobs_folder: Callable[[str], str] = "{}/jobs".format
"""The files of a run's jobs on other machines, from the folder of the adapter."""
job_inputs: Callable[[str], str] = "{}/inputs".format
"""What a job reads, from the job's folder."""
report_folder: OfLineage = "reports/{}".format
report_key: Callable[[str, str, str], str] = "reports/{}/{:.16}/{}".format
"""A file of a run's report, from the lineage, the run's key and the file's name."""
version_folder: OfLineage = "versions/{}".format
version_key: OfNumber = "versions/{}/{:08d}.json".format
version_note_key: Callable[[str, int, str], str] = "versions/{}/{:08d}.{}.json".format
"""A later note about a version, from the lineage, the number and the kind of note: `files` or `removed`."""
promotion_folder: OfLineage = "promotions/{}".format
promotion_key: OfNumber = "promotions/{}/{:08d}.json".format
branch_folder: OfLineage = "branches/{}".format
branch_key: OfNumber = "branches/{}/{:08d}.json".format
branch_judged_key: OfNumber = "branches/{}/{:08d}.judged.json".format
branch_end_key: OfNumber = "branches/{}/{:08d}.end.json".format
export_folder: OfLineage = "exports/{}".format
export_key: Callable[[str, str, str], str] = "exports/{}/{}/{:.32}.json".format
"""An export, from the lineage, the version and the digest of the export's address."""
index_key: Callable[[str], str] = "index/{}.json".format
"""The index of a folder."""
mlflow_key: OfLineage = "mlflow/{}.json".format
mlflow_forget_folder: OfLineage = "mlflow/{}".format
mlflow_forget_key: OfRun = "mlflow/{}/{:.16}.forget".format

settings_key: OfLineage = "lineages/{}.yaml".format
state_key: OfLineage = "lineages/{}.state.json".format
ended_folder: OfLineage = "arrivals/{}".format
ended_key: Callable[[str, int], str] = "arrivals/{}/{}.json".format
"""The arrivals that ended in a year, from the lineage and the year."""

fingerprint_key: Callable[[str, str], str] = "base_models/{}.{}.json".format
"""From the digest of a base model, and its quantization."""
base_scores_key: Callable[[str], str] = "base_models/{}.general.json".format
"""A base model's scores on suites of general ability, from its digest."""
adapter_scores_key: Callable[[str], str] = "{}/general.json".format
"""A version's, from the folder of its adapter."""
log_folder: Callable[[str, str], str] = "{}/{}".format
"""From the log, PREDICTIONS or FEEDBACK, and the lineage."""
log_day_folder: Callable[[str, str, date], str] = "{}/{}/{}".format
"""From the log, the lineage and the day."""
harvest_key: OfLineageAndTask = "harvests/{}/{}.json".format
baseline_folder: OfLineage = "monitor/{}".format
baseline_key: Callable[[str, str], str] = "monitor/{}/{}.parquet".format
"""The live rows that later looks compare with, from the lineage and the version."""


def file_name(key: str) -> str:
    """Return the last part of a key."""
    return key.rsplit("/", 1)[-1]


def lineage_of(key: str) -> str:
    """Return the lineage of a key in `adapters/`, `runs/`, `versions/`, `promotions/` or `arrivals/`."""
    return key.split("/")[1]


def short_run(run_key: str) -> str:
    """Return the part of a run's key that names its folders."""
    return run_key[:16]


class DatasetFile(NamedTuple):
    """A file of a dataset."""

    task: str
    sha256: str
    """Digest of the dataset's rows."""
    lineage: str
    name: str


def parse_dataset_file(key: str) -> DatasetFile | None:
    """Parse the key of a dataset's file; None: the key has another form."""
    match key.split("/"):
        case [folder, task, sha256, lineage, _, name] if folder == DATASETS:
            return DatasetFile(task, sha256, lineage, name)
    return None


def dataset_sha256(uri: str) -> str:
    """Return the digest of a dataset's rows, from its folder or the key of a file in it.

    Example:
        >>> dataset_sha256("datasets/bank/3fa9/support/77c1")
        '3fa9'
    """
    return uri.split("/")[2]


def quarantine_key(task: str, sha256: str, files: Sequence[str]) -> str:
    """Return the key of an arrival's bad rows, from the digests of its good rows and of its files."""
    name = "-".join(digest[:16] for digest in files)
    if len(files) > 2:  # more would make a long name
        name = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"{quarantine_folder(task, sha256)}/{name}.jsonl"


def refused_files_key(quarantine: str) -> str:
    """Return the key of the digests of a refused arrival's files, from the key of its bad rows."""
    return f"{quarantine.removesuffix('.jsonl')}{REFUSED_FILES}"


def task_and_digest(key: str) -> tuple[str, str]:
    """Return the task and the digest of a key in `datasets/` or `quarantine/`."""
    _, task, sha256, *_ = key.split("/")
    return task, sha256


class AdapterFile(NamedTuple):
    """A file in an adapter's folder."""

    lineage: str
    run: str
    """First 16 characters of the run's key."""
    name: str


def parse_adapter_file(key: str) -> AdapterFile | None:
    """Parse the key of an adapter's file; None: the key has another form."""
    match key.split("/", 3):
        case [folder, lineage, run, name] if folder == ADAPTERS:
            return AdapterFile(lineage, run, name)
    return None


def job_inputs_of(key: str) -> str | None:
    """Return the `job_inputs` that a key belongs to; None: it belongs to none.

    Example:
        >>> job_inputs_of("adapters/support/3fa9/jobs/train/inputs/parent/method.json")
        'adapters/support/3fa9/jobs/train/inputs'
    """
    match key.split("/"):
        case [folder, _, _, "jobs", _, "inputs", *_] if folder == ADAPTERS:
            return "/".join(key.split("/")[:6])
    return None


def task_of(key: str) -> str:
    """Return the task of a file in the inbox."""
    return key.split("/")[1]


def task_file_of(key: str) -> str:
    """Return the key of the task file for an arrival in the inbox."""
    return f"{inbox_folder(task_of(key))}/{TASK_FILE}"


def top_of(key: str) -> str:
    """Return the file or folder in a task's folder of the inbox to which a key belongs."""
    return "/".join(key.split("/")[:3])


def is_read(name: str) -> bool:
    """Return whether a file in a folder is read: its name and its subfolders' names do not begin with `.` or `_`.

    Engines that write folders use such names for their own notes, such as `_SUCCESS` and `_committed_1`.
    """
    return not any(part.startswith((".", "_")) for part in name.split("/"))


def arrival_of(key: str) -> str | None:
    """Return the key of the arrival that a file of the inbox belongs to; None: it is not to be learned.

    A file in a task's folder is an arrival, unless it is hidden or the task file. A folder in there is one arrival with
    all its files, except those that `is_read` leaves out.

    Example:
        >>> arrival_of("inbox/bank/may.csv"), arrival_of("inbox/bank/may/day=1/part-0.csv")
        ('inbox/bank/may.csv', 'inbox/bank/may')
    """
    _, *parts = key.split("/")
    if len(parts) == 2:
        return None if parts[1] == TASK_FILE or parts[1].startswith(".") else key
    return top_of(key) if len(parts) > 2 and is_read("/".join(parts[1:])) else None


def run_of_report(key: str) -> str:
    """Return the first part of the run's key, from the key of a file of its report."""
    return key.split("/")[2]


def version_number(key: str) -> str:
    """Return the number, as text, of the version or branch that a key in its lineage's folder belongs to.

    Example:
        >>> version_number("versions/support/00000012.files.json")
        '12'
    """
    return file_name(key).partition(".")[0].lstrip("0")


def log_key(log: str, lineage: str, written: datetime) -> str:
    """Return a new key for a batch of a log that is written at this time (UTC). The keys sort by time.

    Example:
        >>> log_key("predictions", "support", datetime(2026, 3, 1, 12))[:-42]
        'predictions/support/2026-03-01/20260301T120000'
    """
    name = f"{written:{BATCH_TIME}}-{uuid.uuid4().hex}.parquet"
    return f"{log_day_folder(log, lineage, written.date())}/{name}"


def is_log_batch(key: str) -> bool:
    """Return whether a key in the folder of a log is one of `log_key`."""
    return BATCH_NAME.fullmatch(file_name(key)) is not None


def batch_time(key: str) -> datetime:
    """Return the time (UTC) at which a batch of a log was written, from its key."""
    return datetime.strptime(file_name(key)[:15], BATCH_TIME)


def batch_day(key: str) -> date:
    """Return the day (UTC) on which a batch of a log was written, from its key."""
    return batch_time(key).date()
