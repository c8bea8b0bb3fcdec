"""Where a lineage stands: its champion, what it has learned already, and what a crash left undone."""

from __future__ import annotations

import hashlib
import json

from prefect import task
from prefect.cache_policies import NO_CACHE

from infra.ledger import Ledger
from infra.registry import VersionInfo, open_registry
from tasks.finish import finish_run
from tasks.references import BaseRef, DatasetRef, VersionRef
from tasks.services import current_store


@task(name="parent", cache_policy=NO_CACHE)
def find_parent(lineage: str) -> VersionRef | None:
    """The champion, which the next version continues; None: the lineage starts from the base.

    What a crash left undone of the newest version's run is done first, so that no accepted version is passed over.
    """
    registry = open_registry()
    if versions := registry.versions(lineage):
        finish_run(registry, versions[-1], version_ref(versions[-1]))
    champion = registry.champion(lineage)
    return version_ref(champion) if champion else None


@task(name="repeat", cache_policy=NO_CACHE)
def find_repeat(dataset: DatasetRef, lineage: str) -> VersionRef | None:
    """The accepted version that has learned from this dataset, if there is one."""
    entry = Ledger(current_store()).find(lineage, dataset.sha256)
    if entry is None:
        return None
    known = open_registry().find_version(entry.run_key)
    return version_ref(known) if known else None


@task(name="known-run", cache_policy=NO_CACHE)
def find_registered(run_key: str) -> VersionRef | None:
    """The version that a run of this key has registered, accepted or rejected."""
    known = open_registry().find_version(run_key)
    return version_ref(known) if known else None


@task(name="attempts", cache_policy=NO_CACHE)
def count_attempts(lineage: str, dataset: DatasetRef) -> int:
    """How many versions of the lineage were trained on this dataset."""
    return sum(version.dataset_sha256 == dataset.sha256 for version in open_registry().versions(lineage))


def make_run_key(
    *, lineage: str, base: BaseRef, dataset: DatasetRef, parent: VersionRef | None, config_sha256: str, attempt: int
) -> str:
    """Identity of a run: the same arrival on the same parent with the same settings has the same key."""
    origin = parent.version if parent else "base"
    parts = [lineage, base.sha256, dataset.task, dataset.sha256, origin, config_sha256, attempt]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def version_ref(info: VersionInfo) -> VersionRef:
    """The reference to a registered version."""
    return VersionRef(
        lineage=info.lineage,
        version=info.version,
        run_key=info.run_key,
        adapter_uri=info.adapter_uri,
        accepted=info.accepted,
        reasons=info.reasons,
        parent_version=info.parent_version,
    )
