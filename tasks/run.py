"""The MLflow run of an adaptation: started or found again, and always ended."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.errors import RegistryError
from infra.tracking.tracking import open_tracker
from tasks.context import current_store, work_folder
from tasks.references import BaseRef, DatasetRef, RunRef, VersionRef

logger = logging.getLogger(__name__)


@task(name="start", cache_policy=NO_CACHE)
def start_run(
    run_key: str, base: BaseRef, parent: VersionRef | None, dataset: DatasetRef, lineage: str, params: Mapping[str, Any]
) -> RunRef:
    """Start the run of this key, or continue the one that a crash left."""
    tags = {
        "deal.task": dataset.task,
        "deal.dataset_sha256": dataset.sha256,
        "deal.base_sha256": base.sha256,
        "deal.parent_version": parent.version if parent else "base",
    }
    tracked = open_tracker().start(lineage, run_key, name=dataset.task, params={"base": base.name, **params}, tags=tags)
    counts = {"train": dataset.num_train, "test": dataset.num_test, "rejected": dataset.num_rejected}
    tracked.log_dataset(dataset.task, dataset.sha256, current_store().uri_of(dataset.uri), counts)
    return RunRef(lineage=lineage, task=dataset.task, run_key=run_key, tracking_id=tracked.run_id)


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
