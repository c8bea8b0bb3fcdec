"""What a person has asked for a task by command, and its next arrival brings: new labels, and new test rows.

`deal task add-label TASK LABEL` adds labels. A version keeps the labels that it learned. A task file or spec without
the new labels stays valid.

The test rows of a task's first arrival judge it, until `deal task renew-tests TASK` asks for others. The next arrival
with test rows brings them. The rows before stay as a second slice, which is measured and shown too: the task "bank"
then has the slice "bank.old-1".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel

from deal_core.data.schema import label_key
from deal_core.errors import ConfigError
from infra.lineage_state import LineageState, read_state, update
from infra.store.base import ObjectStore
from tasks.lineage.history import find_version
from tasks.lineage.record import KnownSlice, KnownTask, LineageRecord, choose_task, read_record
from tasks.lineage.tombstones import forgotten_tests
from tasks.references import DatasetRef

MAX_NAME = 64
"""Most characters of a task's name, and so of a slice's."""


def added_labels(store: ObjectStore, lineage: str, task_name: str) -> tuple[str, ...]:
    """Return the labels that were added to a task by command, oldest first."""
    return read_state(store, lineage).labels.get(task_name, ())


class LabelsResult(BaseModel, frozen=True):
    """The labels of a task."""

    lineage: str
    task: str
    labels: tuple[str, ...]
    """All labels that the next arrival may use."""
    added: tuple[str, ...]
    """Requested labels that are new."""
    present: tuple[str, ...]
    """Requested labels that the task already had."""


def add_labels(store: ObjectStore, lineage: str, task: str, labels: Sequence[str]) -> LabelsResult:
    """Add labels to a task, after its present labels. The next version that learns the task has the labels too.

    A run that has already read its file ends without the new labels.

    Raises:
        RegistryError: The lineage has no champion.
        ConfigError: The lineage does not know the task, the task has no labels, or a new label is not valid.
    """
    learned = choose_task(read_record(store, find_version(store, lineage, None)), task).schema
    had = learned

    def change(state: LineageState) -> LineageState:
        nonlocal had
        before = state.labels.get(task, ())
        had = learned.with_labels(before)
        added = had.with_labels(labels).labels[len(had.labels) :]
        return state.model_copy(update={"labels": {**state.labels, task: (*before, *added)}}) if added else state

    update(store, lineage, change)
    has = had.with_labels(labels)
    added = has.labels[len(had.labels) :]
    keys = {label_key(label) for label in had.labels}
    present = tuple(label for label in labels if label_key(label) in keys)
    return LabelsResult(lineage=lineage, task=task, labels=has.labels, added=added, present=present)


class RenewalResult(BaseModel, frozen=True):
    """A request for new test rows."""

    lineage: str
    task: str
    num_test: int
    """Test rows that judge the task until then."""
    was_asked: bool
    """Whether the same was asked before and still waits for an arrival."""


def renew_tests(store: ObjectStore, lineage: str, task: str) -> RenewalResult:
    """Let the next arrival of a task bring new test rows.

    The request names the present test rows. So it ends by itself when a version with other test rows becomes champion.

    Raises:
        RegistryError: The lineage has no champion.
        ConfigError: The lineage does not know the task, or its name is too long for a slice's.
    """
    record = read_record(store, find_version(store, lineage, None))
    known = choose_task(record, task)
    _next_slice(record, task)  # it raises now rather than after a training
    was_asked = is_renewal_asked(store, lineage, known)
    renewal = {task: known.test_uris[0]}  # rows that are added to them are no renewal
    update(store, lineage, lambda state: state.model_copy(update={"renewals": state.renewals | renewal}))
    return RenewalResult(lineage=lineage, task=task, num_test=known.grown().num_test, was_asked=was_asked)


def is_renewal_asked(store: ObjectStore, lineage: str, known: KnownTask) -> bool:
    """Return whether the task's present test rows are to be renewed."""
    return read_state(store, lineage).renewals.get(known.schema.name) == known.test_uris[0]


class Renewal(NamedTuple):
    """What an arrival does to the test rows of its task."""

    known: KnownTask | None
    """The task, with the test rows that the arrival replaces; None: the test rows stay."""
    slices: tuple[KnownSlice, ...]
    """The lineage's slices, with the new one."""
    new_slice: str | None
    """Name of the slice that the replaced rows become; None if they stay or were forgotten."""

    def note(self, dataset: DatasetRef) -> str:
        """A remark for people about replaced test rows."""
        assert self.known is not None
        why = "the old rows were forgotten"
        if self.new_slice is not None:
            num_before = self.known.grown().num_test
            why = f"deal task renew-tests asked for them; the {num_before} rows before stay as {self.new_slice}"
        return (
            f"{dataset.task} is judged on {dataset.num_test} new test rows, because {why}; its figures of versions "
            "before the parent are of the old rows"
        )


def find_renewal(store: ObjectStore, record: LineageRecord | None, dataset: DatasetRef) -> Renewal:
    """Return what an arrival does to the test rows of its task.

    They are replaced if they were forgotten, or if `deal task renew-tests` had asked for it when the arrival was
    checked and the arrival has other test rows. A request that comes later is for the next arrival.
    """
    known = record.task(dataset.task) if record else None
    if record is None or known is None:
        return Renewal(None, record.slices if record else (), None)
    if forgotten_tests(store, dataset.task, known.grown().test_uris) is not None:
        return Renewal(known, record.slices, None)
    has_others = dataset.num_test > 0 and dataset.uri not in known.test_uris
    if not has_others or not dataset.renews_tests:
        return Renewal(None, record.slices, None)
    name = _next_slice(record, dataset.task)
    new = KnownSlice(name=name, of=dataset.task, tests=known.grown().tests)
    return Renewal(known, (*record.slices, new), name)


def _next_slice(record: LineageRecord, task: str) -> str:
    """Return the name of a task's next slice, such as bank.old-2; raise ConfigError if it would be too long."""
    taken = {*(known.schema.name for known in record.tasks), *(part.name for part in record.slices)}
    number = 1
    while (name := f"{task}.old-{number}") in taken:
        number += 1
    if len(name) > MAX_NAME:
        raise ConfigError(
            f"The earlier test rows of '{task}' would be called {name!r}, which has more than {MAX_NAME} characters; "
            "test rows of tasks with such long names cannot be renewed."
        )
    return name
