"""Labels that a lineage's task has gained by command: its arrivals may bring them, those that come first and all later.

They stay once a version knows them: what a task file or an older spec says of the task is read as of before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from deal_core.errors import StoreError
from deal_core.schema_version import require_schema_version
from infra.store.base import ObjectStore
from tasks.lineage.version_files import reading_stored

SCHEMA_VERSION = 1
FOLDER = "labels"


def added_labels(store: ObjectStore, lineage: str, task_name: str) -> tuple[str, ...]:
    """The labels that a task has gained by command, in the order in which it has.

    Raises:
        StoreError: their file is damaged, or another version of this program wrote it.
    """
    key = _key(lineage, task_name)
    remedy = "Restore it from a backup of the store, or delete it and add the labels again (deal labels --add)."
    if not store.exists(key):
        return ()
    with reading_stored(store, key, f"the labels that task '{task_name}' of '{lineage}' has gained", remedy):
        values = json.loads(store.get_bytes(key))
        require_schema_version(values, SCHEMA_VERSION, "the file", StoreError)
        return tuple(str(label) for label in values["labels"])


def keep_labels(store: ObjectStore, lineage: str, task_name: str, labels: Sequence[str]) -> None:
    """Write down all labels that a task has gained by command."""
    values = {"schema_version": SCHEMA_VERSION, "labels": list(labels)}
    store.put_bytes(_key(lineage, task_name), json.dumps(values, ensure_ascii=False).encode())


def _key(lineage: str, task_name: str) -> str:
    return f"{FOLDER}/{lineage}/{task_name}.json"
