"""The store, the work folder and the MLflow run of an adaptation, as the environment names them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.errors import DataValidationError, RegistryError, StoreError
from deal_core.safe_text import listed
from infra.settings import HomeSettings, StoreSettings
from infra.store.base import ObjectStore, temporary_folder
from infra.store.local import FileStore, open_store
from infra.tracking.tracker import open_tracker
from tasks.references import BaseRef, DatasetRef, RunRef, VersionRef

logger = logging.getLogger(__name__)


def current_store() -> ObjectStore:
    """Return the object store that the environment names."""
    settings = StoreSettings()
    return open_store(settings.store_uri, settings)


def work_folder(lineage: str, short_key: str) -> Path:
    """Return the folder of a run's checkpoints and results. A run that starts again finds the folder by its key."""
    return HomeSettings().home / "work" / lineage / short_key


@contextmanager
def local_file(store: ObjectStore, address: str) -> Iterator[Path]:
    """Give a local path of a file. A file of a remote store is copied, and the copy is removed at the end.

    Args:
        store: The current store.
        address: A path, a file:// uri, or a full uri in the store. A path may be a folder, see `as_file`.

    Raises:
        StoreError: The uri is of another store, there is no file, or a link leads out of the store's folder.
        DataValidationError: The path is a folder that cannot be read.
    """
    root = store.uri.rstrip("/") + "/"
    if not address.startswith(root):
        with as_file(_outside_store(address, store)) as path:
            yield path
        return
    key = address.removeprefix(root)
    if isinstance(store, FileStore):
        yield store.path_of(key)
        return
    with temporary_folder() as temporary:
        path = temporary / key.rsplit("/", 1)[-1]
        store.download_file(key, path)
        yield path


@contextmanager
def as_file(path: Path) -> Iterator[Path]:
    """Give a file as it is, and a folder that `datasets.save_to_disk` wrote as a temporary Parquet file.

    Raises:
        DataValidationError: The folder holds several splits, or cannot be read.
    """
    if os.path.isfile(path / "dataset_dict.json"):  # Path.is_file raises if the name is too long
        splits = sorted(each.name for each in path.iterdir() if (each / "state.json").is_file())
        raise DataValidationError(
            f"{path} holds the splits {listed(splits)}; give the folder of one of them, and of another as test rows "
            "(test_data)."
        )
    if not os.path.isfile(path / "state.json"):
        yield path
        return
    import datasets

    with temporary_folder() as temporary:
        file = temporary / f"{path.name or 'rows'}.parquet"
        try:
            datasets.disable_progress_bars()
            datasets.load_from_disk(str(path)).to_parquet(str(file))
        except Exception as error:  # damaged folders break the library in many ways
            raise DataValidationError(
                f"{path} looks like a folder of datasets.save_to_disk and cannot be read ({type(error).__name__}); "
                "save it again, or write it with Dataset.to_parquet."
            ) from error
        yield file


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
    """Start the MLflow run of this key, or continue the run that a crash left."""
    tags = run_tags(dataset.task, dataset.sha256, base.sha256, parent.version if parent else None)
    tracked = open_tracker().start(lineage, run_key, name=dataset.task, params={"base": base.name, **params}, tags=tags)
    counts = {"train": dataset.num_train, "test": dataset.num_test, "rejected": dataset.num_rejected}
    tracked.log_dataset(dataset.task, dataset.sha256, current_store().uri_of(dataset.uri), counts)
    return RunRef(lineage=lineage, task=dataset.task, run_key=run_key, tracking_id=tracked.run_id)


def run_tags(task: str, dataset_sha256: str, base_sha256: str, parent_version: str | None) -> dict[str, str]:
    """Return the tags of an adaptation's MLflow run. Without a parent version, the run starts from the base."""
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
    """End the MLflow run as failed. A failure of this call is only logged: it must not hide the run's own error."""
    try:
        end_run(run, "FAILED")
    except RegistryError as error:
        logger.warning("%s", error)


def remove_work(run: RunRef) -> None:
    """Delete the run's checkpoints and local results, after everything is in the store and the registry."""
    folder = work_folder(run.lineage, run.short_key)
    if folder.exists():
        shutil.rmtree(folder)
