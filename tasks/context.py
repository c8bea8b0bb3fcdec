"""The store and the work folders, as the environment names them."""

from __future__ import annotations

from pathlib import Path

from infra.settings import HomeSettings, StoreSettings
from infra.store.base import ObjectStore
from infra.store.local import open_store


def current_store() -> ObjectStore:
    """Return the object store that the environment names."""
    settings = StoreSettings()
    return open_store(settings.store_uri, settings)


def work_folder(lineage: str, short_key: str) -> Path:
    """Return the folder of a run's checkpoints and results. A run that starts again finds the folder by its key."""
    return HomeSettings().home / "work" / lineage / short_key
