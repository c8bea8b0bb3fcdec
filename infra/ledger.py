"""The ledger of a lineage: which version learned a dataset.

The ledger is only added to. It has one object per dataset, `ledger/<lineage>/<sha256>.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from deal_core.errors import StoreError
from deal_core.schema_version import Kept, VersionedJson
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.stored import reading_stored


@dataclass(frozen=True, kw_only=True)
class LedgerEntry(VersionedJson):
    """A dataset that a version of a lineage has learned."""

    kept: ClassVar[Kept] = Kept("The ledger entry", StoreError, version=1)

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
        key = keys.ledger_key(lineage, sha256)
        try:
            content = self.store.get_bytes(key)
        except ObjectNotFoundError:
            return None
        with reading_stored(self.store, key, "an entry of the ledger", "Delete it, if no other release wrote it."):
            return LedgerEntry.from_json(json.loads(content))

    def record(self, entry: LedgerEntry) -> bool:
        """Write an entry unless it exists; return whether it was written. One of several concurrent writers writes."""
        data = json.dumps(entry.to_json(), ensure_ascii=False, indent=2).encode()
        return self.store.put_bytes(keys.ledger_key(entry.lineage, entry.sha256), data, if_absent=True)
