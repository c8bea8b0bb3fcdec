"""The inputs of an arrival, as digests. They name the rows of the prediction log that `deal forget` removes."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from deal_core.data.chats import earlier_turns
from deal_core.data.check import RowChecker
from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.reading.readers import read_rows
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import DatasetManifest, Format, TaskSchema
from deal_core.data.shapes import recognise
from deal_core.errors import DataValidationError
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.keys import DATASETS, MANIFEST_FILE, TEST_FILE, TRAIN_FILE, dataset_sha256
from tasks.data_files import local_file
from tasks.housekeeping.arrivals import KnownArrival
from tasks.inbox import list_arrivals


class ArrivalInputs(NamedTuple):
    """The digests of an arrival's inputs that are known."""

    digests: frozenset[str]
    has_training_rows: bool
    """Whether the training rows are among them. They are deleted once they are learned, and their file may be gone.

    True if the stored training rows, the file of training rows, or all files of the arrival were read.
    """


def arrival_inputs(
    store: ObjectStore, arrival: KnownArrival, inbox_keys: Sequence[str],
    manifests: Iterable[tuple[str, DatasetManifest]],
) -> ArrivalInputs:
    """Return the digests of the inputs of an arrival, from its stored rows and from its files in the inbox.

    Args:
        store: The object store.
        arrival: The arrival.
        inbox_keys: Its files in the inbox.
        manifests: The digests and the manifests of its task's datasets.
    """
    own = [manifest for sha256, manifest in manifests if sha256 in arrival.sha256s]
    schemas = {manifest.task.sha256: manifest.task for manifest in own}
    training_files = {manifest.files[0] for manifest in own if manifest.files}
    found: set[str] = set()
    files_read: set[str] = set()
    has_training_rows = False
    for schema in schemas.values():
        assert schema.format != "auto", "a dataset's task has a format"
        for key in inbox_keys:
            with local_file(store, store.uri_of(key)) as path:
                texts, is_whole = _of_file(path, schema)
                if is_whole:
                    files_read.add(sha256_of_input(path))
            found.update(_digests(schema.format, texts))
        for sha256 in arrival.sha256s:
            for name, texts in _of_dataset(store, arrival.task, sha256):
                found.update(_digests(schema.format, texts))
                has_training_rows |= name == TRAIN_FILE
    has_training_rows |= bool(files_read & training_files) or (
        bool(arrival.files) and files_read.issuperset(arrival.files)
    )
    return ArrivalInputs(frozenset(found), has_training_rows)


def task_inputs(store: ObjectStore, schema: TaskSchema) -> frozenset[str]:
    """Return the digests of a task's inputs that have landed: those of its files in the inbox and of its stored rows.

    Training rows that the store no longer keeps, and whose file is not in the inbox, are not among them.

    Args:
        store: The object store.
        schema: The task, with the names of columns that its files in the inbox have.
    """
    assert schema.format != "auto", "a task that was learned has a format"
    found: set[str] = set()
    for info in list_arrivals(store.list(keys.inbox_folder(schema.name))):
        with local_file(store, store.uri_of(info.key)) as path:
            texts, _ = _of_file(path, schema)
        found.update(_digests(schema.format, texts))
    listing = store.list(f"{DATASETS}/{schema.name}")
    for sha256 in {dataset_sha256(info.key) for info in listing if keys.file_name(info.key) == MANIFEST_FILE}:
        for _, texts in _of_dataset(store, schema.name, sha256):
            found.update(_digests(schema.format, texts))
    return frozenset(found)


def _of_dataset(store: ObjectStore, task: str, sha256: str) -> Iterator[tuple[str, list[str]]]:
    """The inputs of a dataset's stored rows, with the name of their file, once for each lineage with the dataset."""
    for info in store.list(keys.dataset_folder(task, sha256)):
        if (name := keys.file_name(info.key)) in (TRAIN_FILE, TEST_FILE):
            table = pq.read_table(io.BytesIO(store.get_bytes(info.key)), columns=["input"])
            yield name, table.column("input").to_pylist()


def _of_file(path: Path, schema: TaskSchema) -> tuple[list[str], bool]:
    """The inputs of a file's rows in stored form, and whether the file was read to its end.

    Single rows that cannot be read were never learned.
    """
    found: list[str] = []
    try:
        checker = RowChecker(schema, recognise(path, schema), sys.maxsize)
        found.extend(text for raw in read_rows(path) if isinstance(text := checker.check_input(raw), str))
    except DataValidationError:
        return found, False
    return found, True


def _digests(kind: Format, texts: Iterable[str]) -> Iterator[str]:
    """The digests of inputs, and those of a chat's earlier turns, which are learned as rows of their own."""
    for stored in texts:
        yield stored_input_digest(kind, stored).hex()
        if kind == "chat":
            yield from (row.input_digest.hex() for row in earlier_turns(stored))
