"""An adaptation run: its key, the versions that make it a repeat, its start and its end."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from typing import Any, Literal

from prefect import runtime

from deal_core.config import Quantize
from deal_core.errors import RegistryError
from infra.store.format import write_format
from infra.tracking.facts import VersionInfo
from infra.tracking.registry import open_registry
from infra.tracking.tracker import open_tracker
from infra.version_log import Ledger
from tasks.base import load
from tasks.context import current_store, work_folder
from tasks.lineage.history import descent, standing_of, version_ref
from tasks.references import BaseRef, DatasetRef, RunRef, VersionRef

logger = logging.getLogger(__name__)


def find_repeat(dataset: DatasetRef, lineage: str) -> VersionRef | None:
    """Return the accepted version that learned this dataset, or None.

    A version with the same landed rows but another split counts too, unless the champion or one of its ancestors
    learned these rows. In that case the test rows were forgotten, and the arrival brings new test rows.
    """
    registry, ledger = open_registry(), Ledger(current_store())
    versions = registry.versions(lineage)
    line = descent(versions, registry.champion(lineage))
    entry = ledger.find(lineage, dataset.sha256)
    if entry is None and not any(dataset.landed_sha256 in version.digests for version in line):
        same = [version.dataset_sha256 for version in versions if dataset.landed_sha256 in version.digests]
        entry = next(filter(None, (ledger.find(lineage, sha256) for sha256 in same)), None)
    if entry is None:
        return None
    learned = [version for version in line if version.dataset_sha256 == dataset.sha256]
    known = learned[0] if learned else registry.find_version(entry.run_key)
    if known is None or (standing := standing_of(known, line)).startswith("rejected"):
        return None  # it was champion for a while; whether this run repeats it is for the run key to say
    return version_ref(known, standing)


def find_registered(run_key: str) -> VersionRef | None:
    """Return the version that a run with this key registered, accepted or rejected, or None."""
    return _with_standing(open_registry().find_version(run_key))


def find_own(dataset: DatasetRef, lineage: str) -> VersionRef | None:
    """Return the version that this flow run trained on the dataset before it was interrupted, or None."""
    own = [
        version
        for version in open_registry().versions(lineage)
        if version.flow_run and version.flow_run == runtime.flow_run.id and version.dataset_sha256 == dataset.sha256
    ]
    return _with_standing(own[0] if own else None)  # if a version was registered twice, the first one counts


def _with_standing(known: VersionInfo | None) -> VersionRef | None:
    if known is None:
        return None
    registry = open_registry()
    line = descent(registry.versions(known.lineage), registry.champion(known.lineage))
    return version_ref(known, standing_of(known, line))


def count_attempts(lineage: str, dataset: DatasetRef) -> int:
    """Return the number of the lineage's versions that were trained on this dataset."""
    return sum(version.dataset_sha256 == dataset.sha256 for version in open_registry().versions(lineage))


def make_run_key(
    *, lineage: str, base: BaseRef, dataset: DatasetRef, parent: VersionRef | None, config_sha256: str, attempt: int
) -> str:
    """Return the identity of a run: the same arrival, parent and settings give the same key."""
    origin = parent.version if parent else "base"
    parts = [lineage, base.sha256, dataset.task, dataset.sha256, origin, config_sha256, attempt, *dataset.new_labels]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def identify_base(source: str, quantize: Quantize = "none") -> BaseRef:
    """Load a base model and return its name and digest.

    Raises:
        ConfigError: The model cannot be loaded or quantized; see `deal_core.base_model.load.load_base`.
    """
    base = load(source, quantize)
    return BaseRef(source=source, name=base.name, sha256=base.sha256, quantize=quantize)


def start_run(
    run_key: str, base: BaseRef, parent: VersionRef | None, dataset: DatasetRef, lineage: str, params: Mapping[str, Any]
) -> RunRef:
    """Start the MLflow run of this key, or continue the run that a crash left."""
    write_format(current_store())  # before anything of a version, so that the store is known as one of this release
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
