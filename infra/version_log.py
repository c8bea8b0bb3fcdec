"""The versions of a store's lineages as the registry had them: with these a registry that was lost is built again.

One object per version, `versions/<lineage>/<number>.json`. The registry is the truth; these are its copy. They do not
lie in the adapter's folder, since a version stays in the history when its adapter is removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deal_core.errors import StoreError
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.tracking.registry import VersionFacts, VersionInfo


class StoredVersion(BaseModel):
    """What the store knows of one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    lineage: str
    version: str
    created: datetime
    adapter_removed: str | None = None
    """Day on which its adapter was removed."""
    facts: VersionFacts
    """As they were when this was written; what became of the version since is in the promotion log."""

    @property
    def number(self) -> int:
        """The version's number, to count with."""
        return int(self.version)

    @classmethod
    def of(cls, info: VersionInfo) -> StoredVersion:
        """What the registry knows of a version."""
        facts = VersionFacts(**{field.name: getattr(info, field.name) for field in fields(VersionFacts)})
        return cls(
            lineage=info.lineage, version=info.version, created=info.created, adapter_removed=info.adapter_removed,
            facts=facts,
        )  # fmt: skip


class VersionLog:
    """The versions that one store knows."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def keep(self, info: VersionInfo) -> None:
        """Write what the registry knows of a version, in place of what was written before."""
        self._put(StoredVersion.of(info))

    def keep_missing(self, lineage: str, infos: Iterable[VersionInfo]) -> None:
        """Write those versions of a lineage that an earlier release, or a run that died, did not write."""
        known = self.numbers(lineage)
        for info in infos:
            if int(info.version) not in known:
                self.keep(info)

    def note_removed(self, lineage: str, version: str, day: str) -> None:
        """Write that a version's adapter was removed; nothing where the version is not known."""
        try:
            known = self.read(lineage, int(version))
        except ObjectNotFoundError:
            return
        self._put(known.model_copy(update={"adapter_removed": day}))

    def numbers(self, lineage: str) -> frozenset[int]:
        """The numbers of the versions that are written."""
        names = (keys.file_name(info.key) for info in self.store.list(keys.version_folder(lineage)))
        return frozenset(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdecimal())

    def read(self, lineage: str, number: int) -> StoredVersion:
        """One version.

        Raises:
            ObjectNotFoundError: it was not written.
            StoreError: its file is damaged, or another release wrote it.
        """
        key = keys.version_key(lineage, number)
        try:
            return StoredVersion.model_validate_json(self.store.get_bytes(key))
        except ValidationError as error:
            raise StoreError(
                f"{self.store.uri_of(key)}, the store's copy of what the registry knows of version {number} of "
                f"'{lineage}', is damaged ({error.error_count()} of its values do not fit). Restore it from a backup, "
                "or delete it: while the registry knows the version, the next deal adapt writes it again. Everything "
                "else works without it."
            ) from None

    def _put(self, stored: StoredVersion) -> None:
        data = stored.model_dump_json(indent=1) + "\n"
        self.store.put_bytes(keys.version_key(stored.lineage, stored.number), data.encode("utf-8", "replace"))
