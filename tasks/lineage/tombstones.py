"""Tombstones: what was forgotten, when and why, so that a lineage's history stays explicable without the rows.

They lie at `forgotten/<task>/<sha256>.json`: under the digest of every dataset of the landed rows, under the digests of
the rows as they landed, and under those of the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deal_core.errors import DataValidationError, StoreError
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.keys import dataset_sha256


class ForgottenRowsError(DataValidationError):
    """Rows that somebody had forgotten have landed again."""


class TestRowsForgottenError(StoreError):
    """The rows that judge a task were forgotten."""

    __test__ = False


class Tombstone(BaseModel):
    """What is left of a forgotten arrival; none of its rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    task: str
    sha256: str
    """Digest of the dataset, or of the file where no dataset was made of it."""
    files: tuple[str, ...] = ()
    """Digests of the files it came in."""
    splits: tuple[str, ...] = ()
    """Digests of other datasets that held the same landed rows, split otherwise."""
    landed: tuple[str, ...] = ()
    """Digests of the landed rows, however they are split."""
    reason: str
    at: datetime
    versions: tuple[str, ...] = ()
    """LINEAGE/VERSION of every version that learned from it."""

    @property
    def said(self) -> str:
        """When and why, in a few words."""
        why = f" ({self.reason})" if self.reason else ""
        return f"forgotten on {self.at:%Y-%m-%d}{why}"


def find_tombstone(store: ObjectStore, task: str, sha256s: Iterable[str]) -> Tombstone | None:
    """The first tombstone under one of these digests.

    Raises:
        StoreError: a tombstone cannot be understood.
    """
    for sha256 in sha256s:
        key = _key(task, sha256)
        if not store.exists(key):
            continue
        try:
            return Tombstone.model_validate(json.loads(store.get_bytes(key)))
        except (ValueError, ValidationError):
            raise StoreError(
                f"{store.uri_of(key)} is no tombstone that this program reads; use the program version that wrote it."
            ) from None
    return None


def put_tombstone(store: ObjectStore, tombstone: Tombstone) -> None:
    """Put a tombstone under every digest that the rows may come back as, with what one that is there knows added."""
    before = find_tombstone(store, tombstone.task, [tombstone.sha256])
    if before is not None:
        tombstone = tombstone.model_copy(
            update={
                **{
                    name: tuple(dict.fromkeys((*getattr(before, name), *getattr(tombstone, name))))
                    for name in ("files", "splits", "landed", "versions")
                },
                "reason": tombstone.reason or before.reason,
            }
        )
    data = (tombstone.model_dump_json(indent=2) + "\n").encode()
    for sha256 in dict.fromkeys((tombstone.sha256, *tombstone.files, *tombstone.splits, *tombstone.landed)):
        store.put_bytes(_key(tombstone.task, sha256), data)


def refuse_forgotten(store: ObjectStore, task: str, sha256s: Iterable[str], rows: str = "rows") -> None:
    """Refuse rows that were forgotten.

    Args:
        store: holds the tombstones.
        task: whose rows they are.
        sha256s: digests of the rows, or of the files they lie in.
        rows: what to call them.

    Raises:
        ForgottenRowsError: there is a tombstone under one of the digests.
    """
    found = find_tombstone(store, task, sha256s)
    if found is not None:
        raise ForgottenRowsError(
            f"These {rows} of '{task}' were {found.said}; they are not learned again. Land a file without the rows "
            "that had to go, or give --again to deal adapt if they may be learned after all."
        )


def forgotten_tests(store: ObjectStore, task: str, dataset_uri: str) -> Tombstone | None:
    """The tombstone of a task's test rows, where these are gone since they were forgotten."""
    if store.exists(f"{dataset_uri}/test.parquet"):
        return None
    return find_tombstone(store, task, [dataset_sha256(dataset_uri)])


def require_test_rows(store: ObjectStore, task: str, dataset_uri: str) -> None:
    """Say clearly that a task cannot be judged since its test rows were forgotten.

    Raises:
        TestRowsForgottenError: they were.
    """
    found = forgotten_tests(store, task, dataset_uri)
    if found is not None:
        raise TestRowsForgottenError(
            f"The test rows of task '{task}' were {found.said}, so that no version can be judged on it. Adapt to an "
            f"arrival of '{task}' that brings test rows first: they judge the task from then on. Or make a version "
            "that does not know the task champion (deal history, deal promote)."
        )


def _key(task: str, sha256: str) -> str:
    return keys.tombstone_key(task, sha256)
