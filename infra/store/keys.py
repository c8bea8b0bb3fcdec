"""Where everything lies in the object store. Every key is built and parsed in this file.

    inbox/TASK/FILE                           a file that landed; task.yaml says what is known of the task
    datasets/TASK/SHA256/LINEAGE/SCHEMA/FILE  the checked rows of an arrival, and their manifest
    quarantine/TASK/SHA256/FILES.jsonl        the bad rows of an arrival
    adapters/LINEAGE/RUN/FILE                 the adapter of a version, its record and its findings
    ledger/LINEAGE/SHA256.json                which version learned a dataset
    versions/LINEAGE/NUMBER.json              what the registry knows of a version
    promotions/LINEAGE/NUMBER.json            the promotion log
    lineages/LINEAGE.yaml                     the stored settings of a lineage
    labels/LINEAGE/TASK.json                  labels that were added by command
    watch/LINEAGE.json                        what a watch has handled
    forgotten/TASK/SHA256.json                tombstones of forgotten arrivals
    serving/LINEAGE.json                      the name under which a vLLM server answers for a lineage

Older stores have `datasets/TASK/SHA256/FILE`: lineages shared a dataset then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

INBOX = "inbox"
DATASETS = "datasets"
QUARANTINE = "quarantine"
ADAPTERS = "adapters"
LEDGER = "ledger"
VERSIONS = "versions"
PROMOTIONS = "promotions"
LINEAGES = "lineages"
LABELS = "labels"
WATCH = "watch"
FORGOTTEN = "forgotten"

TASK_FILE = "task.yaml"
MANIFEST_FILE = "manifest.json"
TRAIN_FILE = "train.parquet"
TEST_FILE = "test.parquet"


def file_name(key: str) -> str:
    """The last part of a key."""
    return key.rsplit("/", 1)[-1]


def lineage_of(key: str) -> str:
    """The lineage of a key in `adapters/`, `ledger/`, `versions/` or `promotions/`."""
    return key.split("/")[1]


class DatasetFile(NamedTuple):
    """A file of a dataset."""

    task: str
    sha256: str
    """Digest of the dataset's rows."""
    lineage: str | None
    """The lineage that has the dataset; None in older stores, where lineages shared it."""
    name: str


def dataset_folder(task: str, sha256: str) -> str:
    """The folder of all datasets with the same rows."""
    return f"{DATASETS}/{task}/{sha256}"


def dataset_uri(task: str, sha256: str, lineage: str, schema_sha256: str) -> str:
    """The folder of one lineage's dataset."""
    return f"{dataset_folder(task, sha256)}/{lineage}/{schema_sha256[:16]}"


def parse_dataset_file(key: str) -> DatasetFile | None:
    """Read the key of a dataset's file; None: the key has another form."""
    match key.split("/"):
        case [folder, task, sha256, lineage, _, name] if folder == DATASETS:
            return DatasetFile(task, sha256, lineage, name)
        case [folder, task, sha256, name] if folder == DATASETS:
            return DatasetFile(task, sha256, None, name)
    return None


def dataset_sha256(uri: str) -> str:
    """The digest of a dataset's rows, from its folder or from a file in it.

    Example:
        >>> dataset_sha256("datasets/bank/3fa9/support/77c1")
        '3fa9'
    """
    return uri.split("/")[2]


def quarantine_folder(task: str, sha256: str) -> str:
    """The folder of the bad rows of arrivals with the same good rows."""
    return f"{QUARANTINE}/{task}/{sha256}"


def quarantine_key(task: str, sha256: str, files: Sequence[str]) -> str:
    """The file of an arrival's bad rows.

    Arrivals with the same good rows share a folder and have a file each.

    Args:
        task: name of the task.
        sha256: digest of the good rows.
        files: digests of the files that landed.
    """
    return f"{quarantine_folder(task, sha256)}/{'-'.join(digest[:16] for digest in files)}.jsonl"


def task_and_digest(key: str) -> tuple[str, str]:
    """The task and the digest of a key in `datasets/` or `quarantine/`."""
    _, task, sha256, *_ = key.split("/")
    return task, sha256


class AdapterFile(NamedTuple):
    """A file next to an adapter's weights, or the weights."""

    lineage: str
    run: str
    """First 16 characters of the run's key."""
    name: str


def adapters_folder(lineage: str) -> str:
    """The folder of all adapters of a lineage."""
    return f"{ADAPTERS}/{lineage}"


def adapter_uri(lineage: str, run: str) -> str:
    """The folder of the adapter that a run made."""
    return f"{adapters_folder(lineage)}/{run}"


def parse_adapter_file(key: str) -> AdapterFile | None:
    """Read the key of an adapter's file; None: the key has another form."""
    match key.split("/", 3):
        case [folder, lineage, run, name] if folder == ADAPTERS:
            return AdapterFile(lineage, run, name)
    return None


def inbox_folder(task: str) -> str:
    """Where the files of a task land."""
    return f"{INBOX}/{task}"


def task_of(key: str) -> str:
    """The task of a file in the inbox."""
    return key.split("/")[1]


def task_file_of(key: str) -> str:
    """The file that says what is known of the task of an arrival."""
    return f"{inbox_folder(task_of(key))}/{TASK_FILE}"


def is_arrival(key: str) -> bool:
    """Whether a file of the inbox is to be learned.

    It lies in its task's folder, is not hidden, and is not the task file.
    """
    parts = key.split("/")
    return len(parts) == 3 and parts[2] != TASK_FILE and not parts[2].startswith(".")


def ledger_folder(lineage: str) -> str:
    """The folder of a lineage's ledger entries."""
    return f"{LEDGER}/{lineage}"


def ledger_key(lineage: str, sha256: str) -> str:
    """The ledger entry of a dataset."""
    return f"{ledger_folder(lineage)}/{sha256}.json"


def version_folder(lineage: str) -> str:
    """The folder of what the store knows of a lineage's versions."""
    return f"{VERSIONS}/{lineage}"


def version_key(lineage: str, number: int) -> str:
    """What the store knows of one version; keys sort by number."""
    return f"{version_folder(lineage)}/{number:08d}.json"


def promotion_folder(lineage: str) -> str:
    """The folder of a lineage's promotion log."""
    return f"{PROMOTIONS}/{lineage}"


def promotion_key(lineage: str, number: int) -> str:
    """One entry of the promotion log; keys sort by number."""
    return f"{promotion_folder(lineage)}/{number:08d}.json"


def settings_key(lineage: str) -> str:
    """The stored settings of a lineage."""
    return f"{LINEAGES}/{lineage}.yaml"


def labels_key(lineage: str, task: str) -> str:
    """The labels that were added to a task by command."""
    return f"{LABELS}/{lineage}/{task}.json"


def watch_key(lineage: str) -> str:
    """What a watch has handled for a lineage."""
    return f"{WATCH}/{lineage}.json"


def lineage_of_watch(key: str) -> str:
    """The lineage whose watch wrote a key."""
    return file_name(key).removesuffix(".json")


def tombstone_key(task: str, sha256: str) -> str:
    """The tombstone of a forgotten dataset or file."""
    return f"{FORGOTTEN}/{task}/{sha256}.json"


def route_key(lineage: str) -> str:
    """The route of a lineage: under which name a vLLM server answers."""
    return f"serving/{lineage}.json"
