"""Labels that were added to a task of a lineage by command (`deal labels`). The next arrival may use them.

A version keeps the labels that it learned. A task file or spec without the new labels stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from deal_core.data.schema import label_key
from infra.store.base import ObjectStore
from infra.store.keys import labels_key
from infra.store.stored import Stored, read_stored, write_stored
from infra.tracking.database import open_reader
from tasks.context import current_store
from tasks.lineage.history import find_version
from tasks.lineage.record import choose_task, read_record


class AddedLabels(Stored):
    """The labels that were added to a task by command, oldest first."""

    labels: tuple[str, ...]


def added_labels(store: ObjectStore, lineage: str, task_name: str) -> tuple[str, ...]:
    """Return the labels that were added to a task by command, oldest first.

    Raises:
        StoreError: The file is damaged, or another release wrote it.
    """
    found = read_stored(
        store, labels_key(lineage, task_name), AddedLabels,
        what=f"the labels that task '{task_name}' of '{lineage}' has gained",
        remedy="Restore it from a backup of the store, or delete it and add the labels again (deal labels --add).",
    )  # fmt: skip
    return found.labels if found else ()


def keep_labels(store: ObjectStore, lineage: str, task_name: str, labels: Sequence[str]) -> None:
    """Store all labels that were added to a task by command."""
    write_stored(store, labels_key(lineage, task_name), AddedLabels(labels=tuple(labels)))


class LabelsResult(BaseModel):
    """The labels of a task."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    task: str
    labels: tuple[str, ...]
    """All labels that the next arrival may use."""
    added: tuple[str, ...]
    present: tuple[str, ...]
    """Requested labels that the task already had."""


def add_labels(lineage: str, task: str, labels: Sequence[str]) -> LabelsResult:
    """Add labels to a task, after its present labels. The next version that learns the task has the labels too.

    A run that has already read its file ends without the new labels.

    Raises:
        RegistryError: The lineage has no champion.
        ConfigError: The lineage does not know the task, the task has no labels, or a new label is not valid.
    """
    store = current_store()
    known = choose_task(read_record(store, find_version(open_reader(), lineage, None).adapter_uri), task).schema
    before = added_labels(store, lineage, task)
    had = known.with_labels(before)
    has = had.with_labels(labels)
    added = has.labels[len(had.labels) :]
    if added:
        keep_labels(store, lineage, task, (*before, *added))
    keys = {label_key(label) for label in had.labels}
    present = tuple(label for label in labels if label_key(label) in keys)
    return LabelsResult(lineage=lineage, task=task, labels=has.labels, added=added, present=present)
