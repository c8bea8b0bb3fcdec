"""Versions of a lineage: their ancestors and state, and references to them."""

from __future__ import annotations

from collections.abc import Sequence

from infra.tracking.facts import VersionFacts, VersionInfo
from tasks.references import Standing, VersionRef

ROLLOUT = "rollout"
"""The name in the promotion log for an end of a rollout without a person."""


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
        return "rejected by its rollout" if version.refused_by == ROLLOUT else "rejected by a person"
    if any(each.version == version.version for each in line):
        return "learned"
    if "rollout" in version.aliases:
        return "in rollout"
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
