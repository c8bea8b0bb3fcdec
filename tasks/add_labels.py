"""Labels: a task of a lineage gains some by command, and its next arrival may bring rows with them."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from deal_core.data.schema import label_key
from infra.tracking.registry import open_registry
from tasks.context import current_store
from tasks.lineage.history import find_version
from tasks.lineage.labels import added_labels, keep_labels
from tasks.lineage.record import read_record
from tasks.serving.predict import choose_task


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
