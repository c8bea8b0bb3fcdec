"""Ingest: check a landed file and store its rows as a dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError, build_dataset
from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.schema import DatasetManifest
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import MANIFEST_FILE, TRAIN_FILE, quarantine_folder, quarantine_key
from infra.store.stored import reading_stored
from tasks.adaptation.landing import choose_schema, landing_of
from tasks.context import current_store
from tasks.lineage.record import read_record
from tasks.lineage.tombstones import ForgottenRowsError, refuse_forgotten, require_test_rows
from tasks.progress import advance
from tasks.references import Arrival, DatasetRef, VersionRef
from tasks.spec import reading_the_task

QUARANTINE_FILE = "quarantine.jsonl"


@task(name="ingest", cache_policy=NO_CACHE)
def ingest_arrival(
    arrival: Arrival, config: DataConfig, parent: VersionRef | None, lineage: str, again: bool = False
) -> DatasetRef:
    """Check an arrival and store its dataset. Bad rows go to quarantine.

    Args:
        arrival: The file and the settings of its task.
        config: Settings of the checks and the split.
        parent: The version that knows the task's labels and test rows.
        lineage: The lineage of the dataset. Each lineage has a dataset of its own, which it may delete.
        again: Accept forgotten rows.

    Raises:
        DataValidationError: The whole file is refused. The quarantine has the bad rows.
        ForgottenRowsError: The rows were forgotten.
        TaskFieldsError: The settings of the task contradict the lineage.
    """
    store = current_store()
    record = read_record(store, parent.adapter_uri) if parent else None
    with reading_the_task():
        schema = choose_schema(store, arrival, record)
    for known in record.tasks if record else ():  # fail before the training, not after it
        if known.schema.name != arrival.task:
            require_test_rows(store, known.schema.name, known.dataset_uri)
    with (
        landing_of(store, arrival, schema, record, config, advance("ingest")) as landing,
        temporary_folder() as temporary,
    ):
        folder = temporary / "dataset"
        if not again:
            refuse_forgotten(store, arrival.task, [sha256_of_input(landing.source)])
            if landing.test_source is not None:
                refuse_forgotten(store, arrival.task, [sha256_of_input(landing.test_source)], "test rows")
        try:
            manifest = build_dataset(landing, folder)
        except ArrivalRefusedError as error:
            # named by the digest of the file: all datasets without a good row have the same digest
            files = error.report.manifest.files
            kept = _publish_quarantine(store, folder, arrival.task, files[0], files)
            message = str(error).replace(str(folder / QUARANTINE_FILE), store.uri_of(kept) if kept else "")
            raise ArrivalRefusedError(message, error.report) from None
        if not again:
            refuse_forgotten(store, arrival.task, _digests_of(manifest))
        before = record.task(arrival.task) if record else None
        new_labels = schema.labels[len(before.schema.labels) :] if before else ()
        dataset = _publish(store, folder, manifest, lineage, new_labels)
        if not again:
            _withdraw_forgotten(store, dataset)
        return dataset


def _publish(
    store: ObjectStore, folder: Path, manifest: DatasetManifest, lineage: str, new_labels: tuple[str, ...]
) -> DatasetRef:
    """Store the dataset for one lineage and one schema.

    Present test rows stay as they are: they are frozen, and equal digests do not mean equal bytes.
    """
    quarantine = _publish_quarantine(store, folder, manifest.task.name, manifest.sha256, manifest.files)
    uri = keys.dataset_uri(manifest.task.name, manifest.sha256, lineage, manifest.task.sha256)
    try:
        before = read_manifest(store, uri)
    except ObjectNotFoundError:
        store.upload_folder(folder, uri, marker=MANIFEST_FILE)
    else:
        store.upload_file(folder / TRAIN_FILE, f"{uri}/{TRAIN_FILE}")
        merged = replace(
            manifest,
            retain_training_rows=manifest.retain_training_rows or before.retain_training_rows,
            files=tuple(dict.fromkeys((*before.files, *manifest.files))),
        )
        store.put_bytes(f"{uri}/{MANIFEST_FILE}", json.dumps(merged.to_json(), ensure_ascii=False, indent=2).encode())
    return DatasetRef.of(manifest, uri, quarantine=quarantine, new_labels=new_labels)


def _publish_quarantine(
    store: ObjectStore, folder: Path, task_name: str, sha256: str, files: Sequence[str]
) -> str | None:
    """Move the bad rows from the dataset's folder to the store; return their key, or None without bad rows."""
    rows = folder / QUARANTINE_FILE
    key = quarantine_key(task_name, sha256, files) if rows.is_file() and rows.stat().st_size else None
    if key is not None:
        store.upload_file(rows, key)
    rows.unlink(missing_ok=True)
    return key


def _withdraw_forgotten(store: ObjectStore, dataset: DatasetRef) -> None:
    """Delete the dataset if its rows were forgotten while they were stored.

    `deal forget` writes the tombstone before it looks for rows, so one of the two processes always finds the other.
    """
    try:
        refuse_forgotten(store, dataset.task, _digests_of(dataset))
    except ForgottenRowsError:
        store.delete(dataset.uri)
        store.delete(quarantine_folder(dataset.task, dataset.sha256))
        raise


def _digests_of(rows: DatasetManifest | DatasetRef) -> list[str]:
    """The digests under which the rows may have a tombstone: with this split, and as they landed."""
    return [digest for digest in (rows.sha256, rows.landed_sha256) if digest]


def drop_training_rows(store: ObjectStore, dataset_uri: str) -> None:
    """Delete the training rows of a learned dataset, unless the arrival retains them. The call can be repeated.

    No later run needs these rows: each run reads its own file.
    """
    if not retains_training_rows(store, dataset_uri):
        store.delete(f"{dataset_uri}/{TRAIN_FILE}")


def retains_training_rows(store: ObjectStore, dataset_uri: str) -> bool:
    """Return whether a dataset retains its training rows. A dataset without a manifest is incomplete or forgotten."""
    try:
        return read_manifest(store, dataset_uri).retain_training_rows
    except ObjectNotFoundError:
        return False


def read_manifest(store: ObjectStore, dataset_uri: str) -> DatasetManifest:
    """Read the manifest of a dataset.

    Raises:
        ObjectNotFoundError: The manifest is missing.
        StoreError: The manifest is damaged or has another schema version.
    """
    key = f"{dataset_uri}/{MANIFEST_FILE}"
    remedy = "Restore it from a backup of the store. Versions that learned the dataset still predict and serve."
    with reading_stored(store, key, "the record of a dataset", remedy):
        return DatasetManifest.from_json(json.loads(store.get_bytes(key)))
