"""Ingest: a landed file becomes a validated, content-addressed dataset in the store."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import DataConfig
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.data.validate import ArrivalRefusedError, build_dataset
from deal_core.errors import ConfigError
from infra.object_store import ObjectStore
from tasks.progress import advance
from tasks.record import LineageRecord, read_record
from tasks.references import Arrival, DatasetRef, VersionRef
from tasks.services import current_store, local_file

MANIFEST_FILE = "manifest.json"
QUARANTINE_FILE = "quarantine.jsonl"


@task(name="ingest", cache_policy=NO_CACHE)
def ingest_arrival(arrival: Arrival, config: DataConfig, parent: VersionRef | None) -> DatasetRef:
    """Validate an arrival and put its dataset into the store; bad rows go to quarantine.

    Raises:
        DataValidationError: the file is refused whole; what is wrong with it lies in quarantine.
        ConfigError: the user says other things of the task than the lineage knows.
    """
    store = current_store()
    record = read_record(store, parent.adapter_uri) if parent else None
    schema = choose_schema(arrival, record)
    with (
        local_file(store, arrival.data) as source,
        local_file(store, arrival.test_data or arrival.data) as test_source,
        tempfile.TemporaryDirectory(prefix="deal-ingest-") as temporary,
    ):
        folder = Path(temporary) / "dataset"
        try:
            manifest = build_dataset(
                source,
                schema,
                folder,
                config,
                test_source=test_source if arrival.test_data else None,
                frozen_test_rows=_frozen_test_rows(store, record, arrival.task),
                on_progress=advance("ingest"),
            )
        except ArrivalRefusedError as error:
            # by the bad rows: of a file without a good one the dataset is empty, and all such have one digest
            sha256 = _digest_of(folder / QUARANTINE_FILE)
            kept = _publish_quarantine(store, folder, arrival.task, sha256)
            message = str(error).replace(str(folder / QUARANTINE_FILE), kept)
            raise ArrivalRefusedError(message, error.report) from None
        return _publish(store, folder, manifest)


def choose_schema(arrival: Arrival, record: LineageRecord | None) -> TaskSchema:
    """What the user says of the task, else what the lineage knows of it, else what the file will show.

    Raises:
        ConfigError: the lineage knows the task otherwise.
    """
    known = record.task(arrival.task) if record else None
    if known is None:
        return TaskSchema(name=arrival.task, **{"format": "auto", **arrival.given})
    asked = replace(known.schema, **arrival.given)
    for name in ("format", "labels", "instruction", "template"):
        said, stands = getattr(asked, name), getattr(known.schema, name)
        if said != stands:
            raise ConfigError(
                f"task.{name} of '{arrival.task}' is {said!r}, but the lineage learned it as {stands!r}; leave it out, "
                "or start a new lineage."
            )
    return asked


def _frozen_test_rows(store: ObjectStore, record: LineageRecord | None, task_name: str) -> Collection[str]:
    """Digests of the rows that judge the task for good; none when this is the task's first arrival."""
    known = record.task(task_name) if record else None
    if known is None:
        return ()
    with tempfile.TemporaryDirectory(prefix="deal-ingest-") as temporary:
        path = Path(temporary) / "test.parquet"
        store.download_file(f"{known.dataset_uri}/test.parquet", path)
        return frozenset(pq.read_table(path, columns=["sha256"]).column("sha256").to_pylist())


def _publish(store: ObjectStore, folder: Path, manifest: DatasetManifest) -> DatasetRef:
    _publish_quarantine(store, folder, manifest.task.name, manifest.sha256)
    uri = f"datasets/{manifest.task.name}/{manifest.sha256}"
    store.upload_folder(folder, uri, marker=MANIFEST_FILE)
    return DatasetRef(
        task=manifest.task.name,
        uri=uri,
        sha256=manifest.sha256,
        num_train=manifest.num_train,
        num_test=manifest.num_test,
        num_rejected=manifest.num_rejected,
    )


def _publish_quarantine(store: ObjectStore, folder: Path, task_name: str, sha256: str) -> str:
    """Move the bad rows, if there are any, out of the dataset's folder into the store; return where they are."""
    rows = folder / QUARANTINE_FILE
    key = quarantine_key(task_name, sha256)
    if rows.is_file() and rows.stat().st_size:
        store.upload_file(rows, key)
    rows.unlink(missing_ok=True)
    return store.uri_of(key)


def quarantine_key(task_name: str, sha256: str) -> str:
    """Where the bad rows of an arrival are, if it had any."""
    return f"quarantine/{task_name}/{sha256}/rows.jsonl"


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(store: ObjectStore, dataset_uri: str) -> DatasetManifest:
    """The manifest of a dataset in the store."""
    return DatasetManifest.from_json(json.loads(store.get_bytes(f"{dataset_uri}/{MANIFEST_FILE}")))
