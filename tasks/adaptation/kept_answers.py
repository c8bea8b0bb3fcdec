"""Answers: what a version and the one before it said to every test row, kept beside the version's adapter.

They stay in the object store, like the rows that they answer; MLflow gets none of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from deal_core.errors import StoreError
from deal_core.schema_version import require_schema_version
from infra.store.base import ObjectStore
from tasks.lineage.version_files import reading_stored

SCHEMA_VERSION = 1
ANSWERS_FILE = "answers.json"

Answers = dict[str, dict[str, str]]
"""Task to the digest (sha256) of a test row to the answer."""


@dataclass(frozen=True)
class KeptAnswers:
    """The answers that an evaluation generated."""

    now: Answers
    """The version's, on every task of its lineage."""
    before: Answers
    """On a task that was new: the parent's, or for a first version the untouched base model's. On others the parent's
    too, where its own evaluation had not asked it all of their rows."""


def keep_answers(store: ObjectStore, adapter_uri: str, answers: KeptAnswers) -> None:
    """Put an evaluation's answers beside the adapter that it is of."""
    values = {"schema_version": SCHEMA_VERSION, "now": answers.now, "before": answers.before}
    store.put_bytes(f"{adapter_uri}/{ANSWERS_FILE}", json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))


def read_answers(store: ObjectStore, adapter_uri: str) -> KeptAnswers | None:
    """The answers beside an adapter; None where an earlier release kept none.

    Raises:
        StoreError: they are damaged, or of another schema version.
    """
    key = f"{adapter_uri}/{ANSWERS_FILE}"
    if not store.exists(key):
        return None
    remedy = "Restore it from a backup of the store, or delete it: the next evaluation then asks its rows anew."
    with reading_stored(store, key, "the kept answers of a version", remedy):
        values = json.loads(store.get_bytes(key))
        require_schema_version(values, SCHEMA_VERSION, "the file", StoreError)
        return KeptAnswers(now=dict(values["now"]), before=dict(values["before"]))
