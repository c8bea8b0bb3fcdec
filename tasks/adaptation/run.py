"""The identity of a run, its entry in the journal, and what was learned before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from prefect import runtime

from deal_core.config import Quantize
from infra.run_journal import Run, RunJournal
from infra.store.format import write_format
from infra.versions import Version, Versions
from tasks.base import load
from tasks.context import current_store, work_folder
from tasks.references import BaseRef, DatasetRef


def find_repeat(dataset: DatasetRef, lineage: str) -> Version | None:
    """Return the accepted version that learned this dataset, or None.

    A version with the same landed rows but another split counts too, unless the champion or one of its ancestors
    learned these rows. In that case the test rows were forgotten, and the arrival brings new test rows.
    """
    versions = Versions(current_store()).all(lineage)
    learned = [version for version in versions if version.standing == "learned"]
    promoted = [version for version in versions if version.since.promoted is not None]
    same = [version for version in promoted if version.dataset_sha256 == dataset.sha256]
    if not same and not any(dataset.landed_sha256 in version.digests for version in learned):
        same = [version for version in promoted if dataset.landed_sha256 in version.digests]
    if not same:
        return None
    known = next((version for version in learned if version.dataset_sha256 == dataset.sha256), same[0])
    # a rejected one was champion for a while; whether this run repeats it is for the run key to say
    return None if known.is_rejected else known


def find_registered(lineage: str, run_key: str) -> Version | None:
    """Return the version that a run with this key registered, accepted or rejected, or None."""
    return Versions(current_store()).with_run_key(lineage, run_key)


def find_own(dataset: DatasetRef, lineage: str) -> Version | None:
    """Return the version that this flow run trained on the dataset before it was interrupted, or None."""
    return next(
        (
            version
            for version in Versions(current_store()).all(lineage)
            if version.flow_run and version.flow_run == runtime.flow_run.id and version.dataset_sha256 == dataset.sha256
        ),
        None,
    )


def count_attempts(lineage: str, dataset: DatasetRef) -> int:
    """Return the number of the lineage's versions that were trained on this dataset."""
    return sum(version.dataset_sha256 == dataset.sha256 for version in Versions(current_store()).all(lineage))


def make_run_key(
    *, lineage: str, base: BaseRef, dataset: DatasetRef, parent: Version | None, config_sha256: str, attempt: int
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
    run_key: str,
    base: BaseRef,
    parent: Version | None,
    dataset: DatasetRef,
    lineage: str,
    params: Mapping[str, Any],
) -> Run:
    """Write the run into the journal, or continue the one that a crash left."""
    store = current_store()
    write_format(store)  # before anything of a version, so that the store is known as one of this release
    run = Run(
        lineage=lineage,
        task=dataset.task,
        run_key=run_key,
        dataset_uri=dataset.uri,
        dataset_sha256=dataset.sha256,
        num_rows={"train": dataset.num_train, "test": dataset.num_test, "rejected": dataset.num_rejected},
        base_sha256=base.sha256,
        parent_version=parent.version if parent else None,
        params={"base": base.name, **params},
        started=datetime.now(UTC),
    )
    return RunJournal(store).start(run)


def remove_work(run: Run) -> None:
    """Delete the run's checkpoints and local results, after everything is in the store."""
    folder = work_folder(run.lineage, run.short_key)
    if folder.exists():
        shutil.rmtree(folder)
