"""Repeats: whether an arrival was learned before, and the key that identifies a run."""

from __future__ import annotations

import hashlib
import json

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from infra.tracking.facts import VersionInfo
from infra.tracking.registry import open_registry
from infra.version_log import Ledger
from tasks.context import current_store
from tasks.lineage.versions import descent, standing_of, version_ref
from tasks.references import BaseRef, DatasetRef, VersionRef


@task(name="repeat", cache_policy=NO_CACHE)
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
    return version_ref(known, standing_of(known, line)) if known else None


@task(name="known-run", cache_policy=NO_CACHE)
def find_registered(run_key: str) -> VersionRef | None:
    """Return the version that a run with this key registered, accepted or rejected, or None."""
    return _with_standing(open_registry().find_version(run_key))


@task(name="own-version", cache_policy=NO_CACHE)
def find_own(dataset: DatasetRef, lineage: str) -> VersionRef | None:
    """Return the version that this flow run trained on the dataset before it was interrupted, or None."""
    own = [
        version for version in open_registry().versions(lineage)
        if version.flow_run and version.flow_run == runtime.flow_run.id and version.dataset_sha256 == dataset.sha256
    ]  # fmt: skip
    return _with_standing(own[0] if own else None)  # if a version was registered twice, the first one counts


def _with_standing(known: VersionInfo | None) -> VersionRef | None:
    if known is None:
        return None
    registry = open_registry()
    line = descent(registry.versions(known.lineage), registry.champion(known.lineage))
    return version_ref(known, standing_of(known, line))


@task(name="attempts", cache_policy=NO_CACHE)
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
