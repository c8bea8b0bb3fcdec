"""The manifests of datasets in the store."""

from __future__ import annotations

import json

from deal_core.data.schema import DatasetManifest
from infra.store.base import ObjectStore
from infra.store.keys import MANIFEST_FILE
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
