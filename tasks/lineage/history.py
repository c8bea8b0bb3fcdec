"""The versions of a lineage as people ask for them: its history, and one version by its number."""

from __future__ import annotations

from collections.abc import Sequence

from deal_core.errors import RegistryError
from deal_core.safe_text import listed
from infra.branches import Branches
from infra.store import keys
from infra.store.base import ObjectStore
from infra.versions import ROLLOUT, Version, Versions, descent, require_adapter


class NoVersionError(RegistryError):
    """A lineage has no version, and never had one."""

    code = "no-version"


def no_version(lineage: str, version: str) -> RegistryError:
    """Return the error that a lineage has no version with this number."""
    return RegistryError(f"Lineage '{lineage}' has no version {version}; see: deal version list --lineage {lineage}")


def read_history(store: ObjectStore, lineage: str) -> tuple[Version, ...]:
    """Return the versions of a lineage, oldest first.

    Raises:
        NoVersionError: The lineage has no version.
        StoreError: The store does not answer, or a version is damaged.
    """
    versions = Versions(store).all(lineage)
    if not versions:
        raise NoVersionError(unknown_lineage(store, lineage))
    return versions


def find_version(store: ObjectStore, lineage: str, version: str | None) -> Version:
    """Return a version by its number; None: the champion.

    Raises:
        RegistryError: There is no such version, or its adapter was removed.
    """
    if version is None:
        champion = Versions(store).champion(lineage)
        if champion is None:
            raise RegistryError(unknown_lineage(store, lineage))
        return champion
    named = Versions(store).find(lineage, version)
    if named is None:
        raise no_version(lineage, version)
    require_adapter(named)
    return named


def arrival_digests(version: Version, versions: Sequence[Version]) -> frozenset[str]:
    """Return the digests that identify a version's arrival among `versions`.

    If an ancestor learned the same rows, the rows landed again to bring new test rows. Then the digest of the landed
    rows identifies the ancestor's arrival too, so it is left out.
    """
    is_renewal = any(older.landed_sha256 == version.landed_sha256 for older in descent(versions, version)[1:])
    return version.digests - {version.landed_sha256} if is_renewal else version.digests


def rejected_by_person(version: Version) -> str:
    """Return the message for a version that a person or its rollout rejected and that shall become champion."""
    by = "its rollout" if version.since.refused_by == ROLLOUT else "a person"
    return (
        f"Version {version.version} of '{version.lineage}' was rejected by {by}; learn its arrival again with: "
        f"deal version requeue {version.version} --lineage {version.lineage}"
    )


def unknown_lineage(store: ObjectStore, lineage: str) -> str:
    """Return the message for a lineage without a champion."""
    branch = Branches(store).open(lineage)
    if branch is not None and branch.stops_serving:
        return f"Lineage '{lineage}' has no champion for now: {branch.why_waiting}."
    if Versions(store).all(lineage):
        return (
            f"Lineage '{lineage}' has versions, but none is champion. See: deal version list --lineage {lineage}; then "
            f"deal version promote N --lineage {lineage} for one that was accepted, or adapt again."
        )
    names = listed(known_lineages(store))
    others = f"; this home has {names}" if names else ""
    return (
        f"Lineage '{lineage}' has no champion here; adapt it first (deal adapt, deal adapt --watch), "
        f"or name another home with --home or lineage with --lineage{others}."
    )


def known_lineages(store: ObjectStore) -> tuple[str, ...]:
    """Return every lineage with an adapter, a version or a promotion in the store, in alphabetical order."""
    names = {
        keys.lineage_of(info.key)
        for folder in (keys.ADAPTERS, keys.VERSIONS, keys.PROMOTIONS)
        for info in store.list(folder)
        if info.key.count("/") >= 2
    }
    return tuple(sorted(names))
