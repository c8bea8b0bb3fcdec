"""Labels that a task of a lineage gains by command (`deal labels`). The next arrival may bring rows with them.

Labels stay once a version knows them. A task file or an older spec is then read without these labels, as before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from deal_core.data.schema import label_key
from deal_core.errors import StoreError
from deal_core.schema_version import require_schema_version
from infra.store import keys
from infra.store.base import ObjectStore
from infra.tracking.registry import open_registry
from tasks.context import current_store
from tasks.lineage.history import find_version
from tasks.lineage.record import choose_task, read_record
from tasks.lineage.version_files import reading_stored

SCHEMA_VERSION = 1


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
    return keys.labels_key(lineage, task_name)


class LabelsResult(BaseModel):
    """The labels of a task."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    task: str
    labels: tuple[str, ...]
    """All of them, as the next arrival may bring them."""
    added: tuple[str, ...]
    present: tuple[str, ...]
    """What was to be added and was there already."""


def add_labels(lineage: str, task: str, labels: Sequence[str]) -> LabelsResult:
    """Let a task's arrivals bring labels beside those that it has; the next version that learns it has them too.

    Nothing waits for a run: one that has read its file already goes on without.

    Args:
        lineage: whose champion knows the task.
        task: its name.
        labels: what is added after the labels that there are, in this order.

    Raises:
        RegistryError: the lineage has no champion.
        ConfigError: the lineage does not know the task, the task has no labels, or what is given can be none.
    """
    store = current_store()
    known = choose_task(read_record(store, find_version(open_registry(), lineage, None).adapter_uri), task).schema
    before = added_labels(store, lineage, task)
    had = known.with_labels(before)
    has = had.with_labels(labels)
    added = has.labels[len(had.labels) :]
    if added:
        keep_labels(store, lineage, task, (*before, *added))
    keys = {label_key(label) for label in had.labels}
    present = tuple(label for label in labels if label_key(label) in keys)
    return LabelsResult(lineage=lineage, task=task, labels=has.labels, added=added, present=present)
