"""What the store knows of a lineage's versions: a copy of each, and the ledger of the datasets that they learned.

A lost registry can be rebuilt from the copies, `versions/<lineage>/<number>.json`. They are not in the folder of the
adapter, because a version stays in the history after its adapter was removed.

The ledger says which version learned a dataset. It is only added to, one object per dataset,
`ledger/<lineage>/<sha256>.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime

from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.stored import Stored, read_stored, reading_stored
from infra.tracking.facts import VersionFacts, VersionInfo


class StoredVersion(Stored):
    """The copy of one version."""

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
            lineage=info.lineage,
            version=info.version,
            created=info.created,
            adapter_removed=info.adapter_removed,
            facts=facts,
        )


class VersionLog:
    """The copies of versions in one store."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def keep(self, info: VersionInfo) -> None:
        """Write the copy of a registered version; replace an older copy."""
        self._put(StoredVersion.of(info))

    def keep_missing(self, lineage: str, infos: Iterable[VersionInfo]) -> None:
        """Write the missing copies of a lineage's versions. Killed runs did not write them."""
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
        data = stored.model_dump_json(indent=1) + "\n"
        self.store.put_bytes(keys.version_key(stored.lineage, stored.number), data.encode("utf-8", "replace"))


class LedgerEntry(Stored):
    """A dataset that a version of a lineage has learned."""

    lineage: str
    sha256: str
    task: str
    run_key: str
    version: str


class Ledger:
    """The ledgers of a store's lineages."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def find(self, lineage: str, sha256: str) -> LedgerEntry | None:
        """Return the entry of a dataset in a lineage, if there is one.

        Raises:
            StoreError: The entry is damaged, or another release wrote it.
        """
        return read_stored(
            self.store,
            keys.ledger_key(lineage, sha256),
            LedgerEntry,
            what="an entry of the ledger",
            remedy="Delete it, if no other release wrote it.",
        )

    def record(self, entry: LedgerEntry) -> bool:
        """Write an entry unless it exists; return whether it was written. One of several concurrent writers writes."""
        data = entry.model_dump_json(indent=2).encode()
        return self.store.put_bytes(keys.ledger_key(entry.lineage, entry.sha256), data, if_absent=True)
