"""Versions of a lineage: what they continue, what has become of them, and how stages refer to them."""

from __future__ import annotations

from collections.abc import Sequence

from infra.tracking.registry import VersionFacts, VersionInfo
from tasks.references import Standing, VersionRef


def descent(versions: Sequence[VersionInfo], version: VersionInfo | None) -> tuple[VersionInfo, ...]:
    """A version and those it continues, newest first; none without a version."""
    by_number = {each.version: each for each in versions}
    line: list[VersionInfo] = []
    while version is not None:
        line.append(version)
        version = by_number.get(version.parent_version or "")
    return tuple(line)


def arrival_digests(version: VersionInfo, versions: Sequence[VersionInfo]) -> frozenset[str]:
    """By what the arrival that a version learned is known again among `versions`.

    Not by its rows alone where the version continues one that had learned them: they landed again to bring test rows.
    """
    is_renewal = any(older.landed_sha256 == version.landed_sha256 for older in descent(versions, version)[1:])
    return version.digests - {version.landed_sha256} if is_renewal else version.digests


def standing_of(version: VersionInfo, line: Sequence[VersionInfo]) -> Standing:
    """What has become of a version, given the champion's descent."""
    if not version.accepted:
        return "rejected by the gate"
    if version.approval == "refused":
        return "rejected by a person"
    if any(each.version == version.version for each in line):
        return "learned"
    continues_champion = version.parent_version == (line[0].version if line else None)
    return "awaiting approval" if version.approval == "awaiting" and continues_champion else "left behind"


def version_ref(info: VersionInfo, standing: Standing | None = None) -> VersionRef:
    """The reference to a registered version."""
    return ref_by_facts(info.lineage, info.version, info, standing)


def ref_by_facts(lineage: str, version: str, facts: VersionFacts, standing: Standing | None = None) -> VersionRef:
    """The reference to a version of which the facts are known; the registry need not know the version."""
    return VersionRef(
        lineage=lineage,
        version=version,
        run_key=facts.run_key,
        adapter_uri=facts.adapter_uri,
        adapter_sha256=facts.adapter_sha256,
        files_sha256=dict(facts.files_sha256) if facts.files_sha256 is not None else None,
        accepted=facts.accepted,
        reasons=facts.reasons,
        parent_version=facts.parent_version,
        approval=facts.approval,
        standing=standing,
    )
