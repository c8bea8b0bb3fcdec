"""The datasets of arrivals in the store: their manifests, and how long their training rows stay."""

from __future__ import annotations

import json

from deal_core.data.schema import DatasetManifest
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.keys import MANIFEST_FILE, TRAIN_FILE
from infra.store.stored import reading_stored


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


def retains_training_rows(store: ObjectStore, dataset_uri: str) -> bool:
    """Return whether a dataset retains its training rows. A dataset without a manifest is incomplete or forgotten."""
    try:
        return read_manifest(store, dataset_uri).retain_training_rows
    except ObjectNotFoundError:
        return False
