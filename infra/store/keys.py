"""The keys of the object store. Every key is built and parsed in this file.

    format.json                               the format of the store, see `infra.store.format`
    inbox/TASK/FILE                           a file that landed; task.yaml describes the task
    inbox/TASK/FOLDER/FILE                    a file of a folder that landed
    datasets/TASK/SHA256/LINEAGE/SCHEMA/FILE  the checked rows of an arrival, and their manifest
    quarantine/TASK/SHA256/FILES.jsonl        the bad rows of an arrival
    quarantine/TASK/SHA256/FILES.files.json   the digests of its files, if it was refused and has several
    adapters/LINEAGE/RUN/FILE                 the adapter of a version, its record and its findings
    runs/LINEAGE/RUN.json                     the journal of an adaptation: its input, its state and its curves
    reports/LINEAGE/RUN/FILE                  the report of a run, as values; pages are made from it
    versions/LINEAGE/NUMBER.json              a version; beside it, what later replaced or removed its files
    promotions/LINEAGE/NUMBER.json            the promotion log
    index/FOLDER.json                         the content of a folder's objects, which saves requests
    mlflow/LINEAGE.json                       what MLflow has of the lineage
    mlflow/LINEAGE/RUN.forget                 a run whose rows are still to be removed from MLflow
    lineages/LINEAGE.yaml                     the stored settings of a lineage
    labels/LINEAGE/TASK.json                  labels that were added by command
    renewals/LINEAGE/TASK.json                a request for new test rows
    watch/LINEAGE.json                        arrivals that a watch has handled
    landed/LINEAGE/DIGEST.json                announcements of an arrival to the lineage
    batches/LINEAGE/TASK.json                 the files that are learned together now
    counts/TASK.json                          the numbers of rows of files that wait in the inbox
    forgotten/TASK/SHA256.json                tombstones of forgotten arrivals
    serving/LINEAGE.json                      the model name of a lineage in a vLLM server
    serving/LINEAGE.key                       what tells the ids of a lineage's answers from any other
    predictions/LINEAGE/DAY/BATCH.parquet     the prediction log
    feedback/LINEAGE/DAY/BATCH.parquet        right answers to rows of the prediction log, or whether they were right
    harvests/LINEAGE/TASK.json                the feedback that has become rows of an arrival
    monitor/LINEAGE.json                      the last look at a lineage's live traffic, and its open alarms
    monitor/LINEAGE/VERSION.parquet           live rows that later looks compare with, as numbers only

SHA256 is the digest of an arrival's good rows, FILES the digests of its files, SCHEMA that of the task, RUN the first
part of a run's key.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence
from datetime import date, datetime
from typing import NamedTuple

INBOX = "inbox"
DATASETS = "datasets"
QUARANTINE = "quarantine"
ADAPTERS = "adapters"
VERSIONS = "versions"
RUNS = "runs"
PROMOTIONS = "promotions"
LINEAGES = "lineages"
WATCH = "watch"
FORGOTTEN = "forgotten"
SERVING = "serving"
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
BATCH_TIME = "%Y%m%dT%H%M%S"
"""Form of the time (UTC) that the name of a log's batch begins with."""
BATCH_NAME = re.compile(r"\d{8}T\d{6}-.+\.parquet")


def file_name(key: str) -> str:
    """Return the last part of a key."""
    return key.rsplit("/", 1)[-1]


def lineage_of(key: str) -> str:
    """Return the lineage of a key in `adapters/`, `runs/`, `versions/` or `promotions/`."""
    return key.split("/")[1]


class DatasetFile(NamedTuple):
    """A file of a dataset."""

    task: str
    sha256: str
    """Digest of the dataset's rows."""
    lineage: str
    """The lineage of the dataset."""
    name: str


def dataset_folder(task: str, sha256: str) -> str:
    """Return the folder of all datasets with the same rows."""
    return f"{DATASETS}/{task}/{sha256}"


def dataset_uri(task: str, sha256: str, lineage: str, schema_sha256: str) -> str:
    """Return the folder of one lineage's dataset."""
    return f"{dataset_folder(task, sha256)}/{lineage}/{schema_sha256[:16]}"


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


def quarantine_folder(task: str, sha256: str) -> str:
    """Return the folder of the bad rows of all arrivals with the same good rows."""
    return f"{QUARANTINE}/{task}/{sha256}"


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


def adapters_folder(lineage: str) -> str:
    """Return the folder of all adapters of a lineage."""
    return f"{ADAPTERS}/{lineage}"


def short_run(run_key: str) -> str:
    """Return the part of a run's key that names its folders."""
    return run_key[:16]


def landed_key(lineage: str, digest: str) -> str:
    """Return the key of the announcement of an arrival. `digest` is that of its key, content and companions."""
    return f"landed/{lineage}/{digest[:32]}.json"


def adapter_uri(lineage: str, run: str) -> str:
    """Return the folder of the adapter that a run made."""
    return f"{adapters_folder(lineage)}/{run}"


def parse_adapter_file(key: str) -> AdapterFile | None:
    """Parse the key of an adapter's file; None: the key has another form."""
    match key.split("/", 3):
        case [folder, lineage, run, name] if folder == ADAPTERS:
            return AdapterFile(lineage, run, name)
    return None


def inbox_folder(task: str) -> str:
    """Return the folder in which the files of a task land."""
    return f"{INBOX}/{task}"


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


def run_folder(lineage: str) -> str:
    """Return the folder of the journals of a lineage's runs."""
    return f"{RUNS}/{lineage}"


def run_journal_key(lineage: str, run_key: str) -> str:
    """Return the key of the journal of a run."""
    return f"{run_folder(lineage)}/{short_run(run_key)}.json"


def report_folder(lineage: str) -> str:
    """Return the folder of the reports of a lineage's runs."""
    return f"reports/{lineage}"


def report_key(lineage: str, run_key: str, file: str) -> str:
    """Return the key of a file of a run's report."""
    return f"{report_folder(lineage)}/{short_run(run_key)}/{file}"


def run_of_report(key: str) -> str:
    """Return the first part of the run's key, from the key of a file of its report."""
    return key.split("/")[2]


def mlflow_key(lineage: str) -> str:
    """Return the key of the note about what MLflow has of a lineage."""
    return f"mlflow/{lineage}.json"


def mlflow_forget_folder(lineage: str) -> str:
    """Return the folder of the runs whose rows are still to be removed from MLflow."""
    return f"mlflow/{lineage}"


def mlflow_forget_key(lineage: str, run_key: str) -> str:
    """Return the key of the order to remove the rows of a run from MLflow."""
    return f"{mlflow_forget_folder(lineage)}/{short_run(run_key)}.forget"


def index_key(folder: str) -> str:
    """Return the key of a folder's index."""
    return f"index/{folder}.json"


def version_folder(lineage: str) -> str:
    """Return the folder of a lineage's versions."""
    return f"{VERSIONS}/{lineage}"


def version_key(lineage: str, number: int) -> str:
    """Return the key of a version. The keys sort by number."""
    return f"{version_folder(lineage)}/{number:08d}.json"


def version_number(key: str) -> str:
    """Return the number, as text, of the version that a key in `versions/LINEAGE` belongs to.

    Example:
        >>> version_number("versions/support/00000012.files.json")
        '12'
    """
    return file_name(key).partition(".")[0].lstrip("0")


def version_note_key(lineage: str, number: int, kind: str) -> str:
    """Return the key of a later note about a version: `files` or `removed`."""
    return f"{version_folder(lineage)}/{number:08d}.{kind}.json"


def promotion_folder(lineage: str) -> str:
    """Return the folder of a lineage's promotion log."""
    return f"{PROMOTIONS}/{lineage}"


def promotion_key(lineage: str, number: int) -> str:
    """Return the key of an entry of the promotion log. The keys sort by number."""
    return f"{promotion_folder(lineage)}/{number:08d}.json"


def settings_key(lineage: str) -> str:
    """Return the key of a lineage's stored settings."""
    return f"{LINEAGES}/{lineage}.yaml"


def labels_key(lineage: str, task: str) -> str:
    """Return the key of the labels that were added to a task by command."""
    return f"labels/{lineage}/{task}.json"


def renewal_key(lineage: str, task: str) -> str:
    """Return the key of the request for new test rows of a task."""
    return f"renewals/{lineage}/{task}.json"


def watch_key(lineage: str) -> str:
    """Return the key of the arrivals that a watch has handled for a lineage."""
    return f"{WATCH}/{lineage}.json"


def batch_folder(lineage: str) -> str:
    """Return the folder of the files that a lineage learns together now."""
    return f"batches/{lineage}"


def batch_key(lineage: str, task: str) -> str:
    """Return the key of the files of a task that a lineage learns together now."""
    return f"{batch_folder(lineage)}/{task}.json"


def counts_key(task: str) -> str:
    """Return the key of the numbers of rows of a task's files in the inbox."""
    return f"counts/{task}.json"


def lineage_of_watch(key: str) -> str:
    """Return the lineage of a key in `watch/`."""
    return file_name(key).removesuffix(".json")


def tombstone_key(task: str, sha256: str) -> str:
    """Return the key of the tombstone of a forgotten dataset or file."""
    return f"{FORGOTTEN}/{task}/{sha256}.json"


def route_key(lineage: str) -> str:
    """Return the key of a lineage's route: its model name in a vLLM server."""
    return f"{SERVING}/{lineage}.json"


def answer_ids_key(lineage: str) -> str:
    """Return the key of the secret that the ids of a lineage's answers are made with."""
    return f"{SERVING}/{lineage}.key"


def is_answer_ids_key(key: str) -> bool:
    """Return whether a key in `serving/` is one of `answer_ids_key`."""
    return key.endswith(".key")


def log_folder(log: str, lineage: str) -> str:
    """Return the folder of a lineage's prediction log (`log` is PREDICTIONS) or feedback (FEEDBACK)."""
    return f"{log}/{lineage}"


def log_day_folder(log: str, lineage: str, day: date) -> str:
    """Return the folder of one day of a log."""
    return f"{log_folder(log, lineage)}/{day.isoformat()}"


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


def harvest_key(lineage: str, task: str) -> str:
    """Return the key of the note of the feedback that has become rows of an arrival of a task."""
    return f"harvests/{lineage}/{task}.json"


def monitor_key(lineage: str) -> str:
    """Return the key of the last look at a lineage's live traffic."""
    return f"monitor/{lineage}.json"


def baseline_folder(lineage: str) -> str:
    """Return the folder of live rows that later looks compare with."""
    return f"monitor/{lineage}"


def baseline_key(lineage: str, version: str) -> str:
    """Return the key of the live rows that later looks at a version compare with."""
    return f"{baseline_folder(lineage)}/{version}.parquet"
