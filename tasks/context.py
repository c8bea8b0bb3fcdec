"""The store, the work folder and the MLflow run of an adaptation, as the environment names them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.errors import RegistryError
from infra.settings import HomeSettings, StoreSettings
from infra.store.base import ObjectStore
from infra.store.local import open_store
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
