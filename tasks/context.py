"""The store, the work folder and the MLflow run of an adaptation, made from the environment where they are needed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.adapter.files import CONFIG_FILE
from deal_core.errors import RegistryError, StoreError
from infra.settings import HomeSettings, StoreSettings
from infra.store.base import ObjectStore, temporary_folder
from infra.store.local import FileStore, open_store
from infra.tracking.tracker import open_tracker
from tasks.lineage.version_files import reading_beside, require_readable
from tasks.references import BaseRef, DatasetRef, RunRef, VersionRef

logger = logging.getLogger(__name__)


def current_store() -> ObjectStore:
    """The object store that the environment names."""
    settings = StoreSettings()
    return open_store(settings.store_uri, settings)


def work_folder(lineage: str, short_key: str) -> Path:
    """Where a run keeps its checkpoints and results until it is registered; found again by its key after a crash."""
    return HomeSettings().home / "work" / lineage / short_key


@contextmanager
def borrowed_folder(store: ObjectStore, uri: str) -> Iterator[Path]:
    """A local copy of an adapter's folder in the store, gone afterwards.

    `tasks.lineage.adapters` compares the copy with the recorded digests.

    Raises:
        ObjectNotFoundError: its configuration or weights are missing.
        StoreError: they are damaged.
    """
    with temporary_folder() as temporary:
        folder = temporary / "folder"
        with reading_beside(store, uri, CONFIG_FILE):
            store.download_folder(uri, folder)
        require_readable(store, uri, folder)
        yield folder


@contextmanager
def local_file(store: ObjectStore, address: str) -> Iterator[Path]:
    """A local path of a file that is given by path, by a file:// uri, or by its full uri in the store.

    Raises:
        StoreError: the uri is of another store, nothing is there, or a link leads out of its top folder.
    """
    root = store.uri.rstrip("/") + "/"
    if not address.startswith(root):
        yield _outside_store(address, store)
        return
    key = address.removeprefix(root)
    if isinstance(store, FileStore):  # a file of gigabytes need not be copied
        yield store.path_of(key)
        return
    with temporary_folder() as temporary:
        path = temporary / key.rsplit("/", 1)[-1]
        store.download_file(key, path)
        yield path


def _outside_store(address: str, store: ObjectStore) -> Path:
    if "://" not in address:
        return Path(address)
    parts = urlsplit(address)
    if parts.scheme != "file":
        raise StoreError(f"{address} is not in the store {store.uri}; give a local path, or set DEAL_STORE_URI.")
    return Path(unquote(parts.path))


@task(name="start", cache_policy=NO_CACHE)
def start_run(
    run_key: str, base: BaseRef, parent: VersionRef | None, dataset: DatasetRef, lineage: str, params: Mapping[str, Any]
) -> RunRef:
    """Start the run of this key, or continue the one that a crash left."""
    tags = run_tags(dataset.task, dataset.sha256, base.sha256, parent.version if parent else None)
    tracked = open_tracker().start(lineage, run_key, name=dataset.task, params={"base": base.name, **params}, tags=tags)
    counts = {"train": dataset.num_train, "test": dataset.num_test, "rejected": dataset.num_rejected}
    tracked.log_dataset(dataset.task, dataset.sha256, current_store().uri_of(dataset.uri), counts)
    return RunRef(lineage=lineage, task=dataset.task, run_key=run_key, tracking_id=tracked.run_id)


def run_tags(task: str, dataset_sha256: str, base_sha256: str, parent_version: str | None) -> dict[str, str]:
    """The tags of an adaptation's MLflow run; without a parent version the run starts from the base."""
    return {
        "deal.task": task,
        "deal.dataset_sha256": dataset_sha256,
        "deal.base_sha256": base_sha256,
        "deal.parent_version": parent_version or "base",
    }


def end_run(run: RunRef, status: Literal["FINISHED", "FAILED"]) -> None:
    """End the MLflow run."""
    open_tracker().run(run.tracking_id).end(status)


def fail_run(run: RunRef) -> None:
    """End the MLflow run as failed; that it cannot be ended is logged, and does not hide why the adaptation failed."""
    try:
        end_run(run, "FAILED")
    except RegistryError as error:
        logger.warning("%s", error)


def remove_work(run: RunRef) -> None:
    """Delete the run's checkpoints and local results; everything is in the store and the registry by now."""
    folder = work_folder(run.lineage, run.short_key)
    if folder.exists():
        shutil.rmtree(folder)
