"""The store's copy of a lineage's versions in the registry. A lost registry can be rebuilt from this copy.

There is one object per version, `versions/<lineage>/<number>.json`. The objects are not in the adapter's folder,
because a version stays in the history after its adapter was removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.stored import reading_stored
from infra.tracking.facts import VersionFacts, VersionInfo


class StoredVersion(BaseModel):
    """The copy of one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    lineage: str
    version: str
    created: datetime
    adapter_removed: str | None = None
    """Day on which its adapter was removed."""
    facts: VersionFacts
    """The facts when the copy was written. Later changes are in the promotion log."""

    @property
    def number(self) -> int:
        """The version as a number."""
        return int(self.version)

    @classmethod
    def of(cls, info: VersionInfo) -> StoredVersion:
        """Make the copy of a registered version."""
        facts = VersionFacts(**{field.name: getattr(info, field.name) for field in fields(VersionFacts)})
        return cls(
            lineage=info.lineage, version=info.version, created=info.created, adapter_removed=info.adapter_removed,
            facts=facts,
        )  # fmt: skip


class VersionLog:
    """The copies of versions in one store."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def keep(self, info: VersionInfo) -> None:
        """Write the copy of a registered version; replace an older copy."""
        self._put(StoredVersion.of(info))

    def keep_missing(self, lineage: str, infos: Iterable[VersionInfo]) -> None:
        """Write the missing copies of a lineage's versions. Earlier releases and killed runs did not write them."""
        known = self.numbers(lineage)
        for info in infos:
            if int(info.version) not in known:
                self.keep(info)

    def note_removed(self, lineage: str, version: str, day: str) -> None:
        """Write that a version's adapter was removed, if the version has a copy."""
        try:
            known = self.read(lineage, int(version))
        except ObjectNotFoundError:
            return
        self._put(known.model_copy(update={"adapter_removed": day}))

    def numbers(self, lineage: str) -> frozenset[int]:
        """Return the numbers of the versions that have a copy."""
        infos = self.store.list(keys.version_folder(lineage))
        names = [keys.file_name(info.key).removesuffix(".json") for info in infos]
        return frozenset(int(name) for name in names if name.isdecimal())

    def read(self, lineage: str, number: int) -> StoredVersion:
        """Return the copy of one version.

        Raises:
            ObjectNotFoundError: The version has no copy.
            StoreError: The copy is damaged, or another release wrote it.
        """
        key = keys.version_key(lineage, number)
        what = f"the store's copy of what the registry knows of version {number} of '{lineage}'"
        remedy = (
            "Restore it from a backup, or delete it: while the registry knows the version, the next deal adapt writes "
            "it again. Everything else works without it."
        )
        with reading_stored(self.store, key, what, remedy):
            return StoredVersion.model_validate_json(self.store.get_bytes(key))

    def _put(self, stored: StoredVersion) -> None:
        later = {"facts": {"rollout"}} if stored.facts.rollout is None else None  # earlier releases do not know it
        data = stored.model_dump_json(indent=1, exclude=later) + "\n"
        self.store.put_bytes(keys.version_key(stored.lineage, stored.number), data.encode("utf-8", "replace"))
