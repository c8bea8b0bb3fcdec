"""Versions of a lineage: their ancestors and state, references to them, and whether an arrival was learned before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from infra.promotions import Ledger
from infra.tracking.registry import VersionFacts, VersionInfo, open_registry
from tasks.context import current_store
from tasks.references import BaseRef, DatasetRef, Standing, VersionRef


def descent(versions: Sequence[VersionInfo], version: VersionInfo | None) -> tuple[VersionInfo, ...]:
    """Return a version and its ancestors, newest first. Without a version the result is empty."""
    by_number = {each.version: each for each in versions}
    line: list[VersionInfo] = []
    while version is not None:
        line.append(version)
        version = by_number.get(version.parent_version or "")
    return tuple(line)


def arrival_digests(version: VersionInfo, versions: Sequence[VersionInfo]) -> frozenset[str]:
    """Return the digests that identify a version's arrival among `versions`.

    If an ancestor learned the same rows, the rows landed again to bring new test rows. Then the digest of the landed
    rows identifies the ancestor's arrival too, so it is left out.
    """
    is_renewal = any(older.landed_sha256 == version.landed_sha256 for older in descent(versions, version)[1:])
    return version.digests - {version.landed_sha256} if is_renewal else version.digests


def standing_of(version: VersionInfo, line: Sequence[VersionInfo]) -> Standing:
    """Return the state of a version. `line` is the champion and its ancestors."""
    if not version.accepted:
        return "rejected by the gate"
    if version.approval == "refused":
        return "rejected by a person"
    if any(each.version == version.version for each in line):
        return "learned"
    continues_champion = version.parent_version == (line[0].version if line else None)
    return "awaiting approval" if version.approval == "awaiting" and continues_champion else "left behind"


def version_ref(info: VersionInfo, standing: Standing | None = None) -> VersionRef:
    """Return the reference to a registered version."""
    return ref_by_facts(info.lineage, info.version, info, standing)


def ref_by_facts(lineage: str, version: str, facts: VersionFacts, standing: Standing | None = None) -> VersionRef:
    """Return the reference to a version with these facts. The version need not be registered."""
    shared = VersionRef.model_fields.keys() - {"lineage", "version", "standing"}
    return VersionRef(
        lineage=lineage, version=version, standing=standing, **{name: getattr(facts, name) for name in shared}
    )


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
