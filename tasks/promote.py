"""Promote: an accepted version becomes the champion, and its dataset counts as learned."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from infra.ledger import Ledger, LedgerEntry
from infra.registry import Registry, VersionInfo, open_registry
from infra.tracking import open_tracker
from tasks.references import VersionRef
from tasks.services import current_store


@task(name="promote", cache_policy=NO_CACHE)
def promote_version(version: VersionRef) -> None:
    """Move the lineage's aliases to an accepted version. Only one run of a lineage may be here at a time."""
    registry = open_registry()
    known = registry.find_version(version.run_key)
    assert known is not None, "the version was registered by this run"
    move_aliases(registry, Ledger(current_store()), known)


def move_aliases(registry: Registry, ledger: Ledger, version: VersionInfo) -> None:
    """The steps of a promotion; each can be repeated, and `challenger` moves last, as the sign that all is done."""
    registry.set_alias(version.lineage, "champion", version.version)
    ledger.record(
        LedgerEntry(
            lineage=version.lineage,
            sha256=version.dataset_sha256,
            task=version.task,
            run_key=version.run_key,
            version=version.version,
        )
    )
    registry.set_alias(version.lineage, "challenger", version.version)


def finish_promotion(registry: Registry, ledger: Ledger, version: VersionInfo) -> None:
    """Complete a promotion whose process died, and end its MLflow run."""
    move_aliases(registry, ledger, version)
    open_tracker().run(version.tracking_id).end()
