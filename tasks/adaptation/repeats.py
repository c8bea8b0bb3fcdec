"""Whether an arrival was learned before: by its rows, by the run's key, or by this flow run itself."""

from __future__ import annotations

import hashlib
import json

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from infra.promotions import Ledger
from infra.tracking.registry import VersionInfo, open_registry
from tasks.context import current_store
from tasks.lineage.versions import descent, standing_of, version_ref
from tasks.references import BaseRef, DatasetRef, VersionRef


@task(name="repeat", cache_policy=NO_CACHE)
def find_repeat(dataset: DatasetRef, lineage: str) -> VersionRef | None:
    """The accepted version that has learned from this dataset, if there is one.

    Outside the champion's descent also one that has learned these rows split otherwise, by test rows that the lineage
    knew then. In it that is no repeat: the test rows were forgotten since, and the arrival brings new ones.
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
    """The version that a run of this key has registered, accepted or rejected."""
    return _with_standing(open_registry().find_version(run_key))


@task(name="own-version", cache_policy=NO_CACHE)
def find_own(dataset: DatasetRef, lineage: str) -> VersionRef | None:
    """The version that this flow run has trained on a dataset, if it was interrupted later and started again."""
    own = [
        version for version in open_registry().versions(lineage)
        if version.flow_run and version.flow_run == runtime.flow_run.id and version.dataset_sha256 == dataset.sha256
    ]  # fmt: skip
    return _with_standing(own[0] if own else None)  # of a doubled one the first counts


def _with_standing(known: VersionInfo | None) -> VersionRef | None:
    if known is None:
        return None
    registry = open_registry()
    line = descent(registry.versions(known.lineage), registry.champion(known.lineage))
    return version_ref(known, standing_of(known, line))


@task(name="attempts", cache_policy=NO_CACHE)
def count_attempts(lineage: str, dataset: DatasetRef) -> int:
    """How many versions of the lineage were trained on this dataset."""
    return sum(version.dataset_sha256 == dataset.sha256 for version in open_registry().versions(lineage))


def make_run_key(
    *, lineage: str, base: BaseRef, dataset: DatasetRef, parent: VersionRef | None, config_sha256: str, attempt: int
) -> str:
    """Identity of a run: the same arrival on the same parent with the same settings has the same key."""
    origin = parent.version if parent else "base"
    parts = [lineage, base.sha256, dataset.task, dataset.sha256, origin, config_sha256, attempt, *dataset.new_labels]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
