"""The start of an adaptation, and its end: the base model's digest, the MLflow run, and the work folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import Quantize
from deal_core.errors import RegistryError
from infra.tracking.tracker import open_tracker
from tasks.base import load
from tasks.context import current_store, work_folder
from tasks.references import BaseRef, DatasetRef, RunRef, VersionRef

logger = logging.getLogger(__name__)


@task(name="base", cache_policy=NO_CACHE)
def identify_base(source: str, quantize: Quantize = "none") -> BaseRef:
    """Load a base model and return its name and digest.

    Raises:
        ConfigError: The model cannot be loaded or quantized; see `deal_core.base_model.load.load_base`.
    """
    base = load(source, quantize)
    return BaseRef(source=source, name=base.name, sha256=base.sha256, quantize=quantize)


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
