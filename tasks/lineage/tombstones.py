"""Tombstones: which arrival was forgotten, when and why. They explain a lineage's history without the rows.

A tombstone is at `forgotten/TASK/SHA256.json`, once for each digest of a dataset of the landed rows, of the rows as
they landed, and of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from deal_core.errors import DataValidationError, StoreError
from infra.deleted_inputs import UnknownRows
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.keys import dataset_sha256
from infra.store.stored import Stored, read_stored, write_stored
from infra.versions import ArrivalDigests


class ForgottenRowsError(DataValidationError):
    """Forgotten rows have landed again."""

    code = "forgotten-rows"


class TestRowsForgottenError(StoreError):
    """The test rows of a task were forgotten."""

    code = "forgotten-test-rows"

    __test__ = False


class Tombstone(ArrivalDigests, Stored):
    """The facts about a forgotten arrival, without its rows."""

    reason: str
    at: datetime
    """When it was forgotten."""
    versions: tuple[str, ...] = ()
    """LINEAGE/VERSION of every version that learned from the arrival."""
    inbox_keys: tuple[str, ...] = ()
    """Where it lay in the inbox. The keys name it when nothing lies there any more."""
    unknown: tuple[UnknownRows, ...] = ()
    """The rows whose inputs could not be known, so that the prediction log was not searched for them."""

    @property
    def said(self) -> str:
        """The date and the reason, in a few words."""
        why = f" ({self.reason})" if self.reason else ""
        return f"forgotten on {self.at:%Y-%m-%d}{why}"


def find_tombstone(store: ObjectStore, task: str, sha256s: Iterable[str]) -> Tombstone | None:
    """Return the first tombstone under one of these digests, or None."""
    for sha256 in sha256s:
        tombstone = read_stored(
            store,
            keys.tombstone_key(task, sha256),
            Tombstone,
            what="the tombstone of forgotten rows",
            remedy="Restore it from a backup of the store: it keeps the rows from being learned again.",
        )
        if tombstone is not None:
            return tombstone
    return None


def put_tombstone(store: ObjectStore, tombstone: Tombstone) -> Tombstone:
    """Write a tombstone under every digest by which the rows may return; return it with the facts of a present one."""
    before = find_tombstone(store, tombstone.task, [tombstone.sha256])
    if before is not None:
        merged = {
            name: tuple(dict.fromkeys((*getattr(before, name), *getattr(tombstone, name))))
            for name in ("files", "splits", "landed", "versions", "inbox_keys")
        }
        tombstone = tombstone.model_copy(update={**merged, "reason": tombstone.reason or before.reason})
    for sha256 in dict.fromkeys((tombstone.sha256, *tombstone.files, *tombstone.splits, *tombstone.landed)):
        write_stored(store, keys.tombstone_key(tombstone.task, sha256), tombstone)
    return tombstone


def refuse_forgotten(store: ObjectStore, task: str, sha256s: Iterable[str], rows: str = "rows") -> None:
    """Raise ForgottenRowsError if rows or files with one of these digests were forgotten. The message says `rows`."""
    tombstone = find_tombstone(store, task, sha256s)
    if tombstone is not None:
        raise ForgottenRowsError(
            f"These {rows} of '{task}' were {tombstone.said}; they are not learned again. Land a file without the "
            "forgotten rows. If the rows may be learned after all, give --force to deal adapt."
        )


def forgotten_tests(store: ObjectStore, task: str, dataset_uris: Sequence[str]) -> Tombstone | None:
    """Return the tombstone of a task's test rows, or None if those of one of the datasets were not forgotten."""
    tombstone = None
    for uri in dataset_uris:
        if store.exists(f"{uri}/{keys.TEST_FILE}"):
            return None
        tombstone = find_tombstone(store, task, [dataset_sha256(uri)])
        if tombstone is None:  # the rows are lost, and nobody has asked for it
            return None
    return tombstone


def require_test_rows(store: ObjectStore, task: str, dataset_uris: Sequence[str]) -> None:
    """Raise TestRowsForgottenError if all test rows of a task were forgotten."""
    tombstone = forgotten_tests(store, task, dataset_uris)
    if tombstone is not None:
        raise TestRowsForgottenError(
            f"The test rows of task '{task}' were {tombstone.said}, so that no version can be judged on it. First "
            f"adapt to an arrival of '{task}' with test rows: they judge the task from then on. Or promote a version "
            "that does not know the task (deal version list, deal version promote)."
        )
