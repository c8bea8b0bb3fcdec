"""Promote: an accepted version becomes the champion, and its dataset counts as learned."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.errors import RegistryError
from infra.ledger import Ledger, LedgerEntry
from infra.registry import Registry, VersionInfo, open_registry
from tasks.references import VersionRef
from tasks.services import current_store


@task(name="promote", cache_policy=NO_CACHE)
def promote_version(version: VersionRef) -> None:
    """Move the lineage's aliases to an accepted version. Only one run of a lineage may be here at a time."""
    registry = open_registry()
    known = registry.find_version(version.run_key)
    assert known is not None, "the version was registered by this run"
    move_aliases(registry, Ledger(current_store()), known)


def is_overtaken(registry: Registry, version: VersionInfo) -> bool:
    """Whether the champion is neither the version nor what it continues, so that promoting it would lose a task."""
    champion = registry.champion(version.lineage)
    return (champion.version if champion else None) not in (version.parent_version, version.version)


def move_aliases(registry: Registry, ledger: Ledger, version: VersionInfo) -> None:
    """The steps of a promotion; each can be repeated, and `challenger` moves last, as the sign that all is done.

    Raises:
        RegistryError: another version took the place of the one that this version continues.
    """
    if is_overtaken(registry, version):
        champion = registry.champion(version.lineage)
        raise RegistryError(
            f"Version {version.version} of {version.lineage} continues "
            f"{f'version {version.parent_version}' if version.parent_version else 'the base model'}, but "
            f"{f'version {champion.version} is' if champion else 'no version is'} champion now; it was not promoted. "
            "Run the same command again: it starts from the champion of now."
        )
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
