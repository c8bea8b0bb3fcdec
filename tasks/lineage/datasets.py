"""The datasets of arrivals in the store: their manifests, and how long their training rows stay."""

from __future__ import annotations

import json
from collections.abc import Iterable

from deal_core.data.schema import DatasetManifest
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.keys import INPUTS_FILE, MANIFEST_FILE, TRAIN_FILE, dataset_folder, file_name
from infra.store.stored import reading_stored
from infra.versions import Version, Versions
from tasks.references import DatasetRef


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


def drop_training_rows(store: ObjectStore, dataset_uri: str) -> None:
    """Delete the training rows of a learned dataset, unless the arrival retains them. The call can be repeated.

    No later run needs these rows: each run reads its own file.
    """
    if not retains_training_rows(store, dataset_uri):
        store.delete(f"{dataset_uri}/{TRAIN_FILE}")


def drop_held_rows(store: ObjectStore, lineage: str, dataset: DatasetRef) -> None:
    """Delete the rows of an arrival that is held, whatever it retains. When it goes on, its file is read again.

    A dataset that a version has learned stays without its training rows: its test rows may judge a task.
    """
    is_of_version = any(version.dataset_sha256 == dataset.sha256 for version in Versions(store).all(lineage))
    store.delete(f"{dataset.uri}/{TRAIN_FILE}" if is_of_version else dataset.uri)


def retains_training_rows(store: ObjectStore, dataset_uri: str) -> bool:
    """Return whether a dataset retains its training rows. A dataset without a manifest is incomplete or forgotten."""
    try:
        return read_manifest(store, dataset_uri).retain_training_rows
    except ObjectNotFoundError:
        return False


def learned_inputs(store: ObjectStore, line: Iterable[Version], task: str) -> frozenset[bytes]:
    """Return the digests (`stored_input_digest`) of a task's texts that a line of versions has been trained on.

    They are known as long as the dataset of the arrival is stored: `deal data delete` deletes it.
    """
    inputs: set[bytes] = set()
    for sha256 in {version.dataset_sha256 for version in line if version.task == task and not version.is_consolidation}:
        for info in store.list(dataset_folder(task, sha256)):
            if file_name(info.key) == INPUTS_FILE:
                content = store.get_bytes(info.key)
                inputs.update(content[place : place + 32] for place in range(0, len(content), 32))
    return frozenset(inputs)
