"""What a lineage has to learn now, and what waits: the settings `retrain`, asked about the files in the inbox."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from pydantic import Field

from deal_core.data.reading.readers import count_rows
from deal_core.errors import DataValidationError, StoreError
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectStore
from infra.store.stored import Stored, read_stored, write_stored
from infra.versions import Versions
from tasks.batches import Batch, read_batches
from tasks.data_files import local_files
from tasks.inbox import InboxLook, InboxState, files_of
from tasks.lineage.retrain import Waiting, WaitingFile, when_to_train
from tasks.lineage.settings import WatchedLineage

logger = logging.getLogger(__name__)

_counted: dict[tuple[str, str, str], int] = {}
"""Rows of files that this process knows, by the store's address, key and ETag; see `_count`."""


class Due(NamedTuple):
    """An arrival that a lineage has to learn now."""

    files: tuple[ObjectInfo, ...]
    """Files and folders, oldest first."""
    batch: Batch | None = None
    """The open batch that the files are of; None: there is none yet."""
    is_fixed: bool = False
    """Whether the files are to be fixed as a batch before they are learned."""


class Plan(NamedTuple):
    """What a lineage has to learn now, in this order, and what waits."""

    due: list[Due]
    waiting: tuple[Waiting, ...]
    """One entry for each task of which files wait or are due; empty if nothing ever waits for this lineage."""

    @property
    def files(self) -> list[ObjectInfo]:
        """The files that are due."""
        return [info for each in self.due for info in each.files]


def plan(
    store: ObjectStore,
    lineage: WatchedLineage,
    inbox: InboxLook,
    state: InboxState,
    files: Sequence[ObjectInfo],
    now: datetime,
) -> Plan:
    """Decide about a lineage's open files. Open batches come first, then the task with the oldest file.

    Args:
        store: The store.
        lineage: The lineage.
        inbox: The last look at the inbox.
        state: The state of the lineage's watch.
        files: The open and complete files of the look, oldest first.
        now: The time.

    Raises:
        StoreError: The store does not answer, or a batch is damaged.
    """
    if not files:
        return Plan([], ())
    batches = [batch for batch in read_batches(store, lineage.lineage) if not batch.is_over(inbox, state, now)]
    due = [each for batch in batches for each in _due_of(batch, files)]
    others = [info for info in files if not any(batch.has(info) for batch in batches)]
    if not lineage.retrain.may_wait:
        behind = {batch.task for batch in batches}  # of a policy that the lineage had before
        return Plan([*due, *(Due((info,)) for info in others if keys.task_of(info.key) not in behind)], ())
    by_task: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in others:
        by_task[keys.task_of(info.key)].append(info)
    num_rows, waiting, new = _count(store, inbox, files), [], []
    for batch in batches:
        own = [info for info in files if batch.has(info)]
        if own:  # else it failed, and its next try is not due
            waiting += [_describe(lineage, batch.task, own, num_rows, is_due=True, why="A run has begun to learn this")]
        if later := by_task.pop(batch.task, []):
            why = "An earlier batch of the task must end first"
            waiting += [_describe(lineage, batch.task, later, num_rows, is_due=False, why=why)]
    for task, infos in by_task.items():
        # What cannot be counted is due at once, alone, so that it is refused and holds up nothing.
        new += [Due((info,)) for info in infos if not num_rows[info.key]]
        countable = [info for info in infos if num_rows[info.key]]
        decided = when_to_train(
            lineage.retrain,
            task,
            [
                WaitingFile(_landed(info), num_rows[info.key], len(files_of(info)), state.requeued(info) is not None)
                for info in countable
            ],
            now=now,
            spent_hours=lambda: spent_hours(store, lineage, now),
        )
        waiting += [decided] if decided else []
        new += [Due(tuple(countable), is_fixed=True)] if decided and decided.is_due else []
    return Plan([*due, *new], tuple(waiting))


def _due_of(batch: Batch, files: Sequence[ObjectInfo]) -> list[Due]:
    """The arrivals of an open batch that are due: all of its files, or each of them alone if it was split."""
    own = tuple(info for info in files if batch.has(info))
    if batch.is_split:
        return [Due((info,), batch) for info in own]
    return [Due(own, batch)] if len(own) == len(batch.files) else []


def _landed(info: ObjectInfo) -> datetime:
    return info.landed or info.modified


def _describe(
    lineage: WatchedLineage,
    task: str,
    files: Sequence[ObjectInfo],
    num_rows: Mapping[str, int],
    *,
    is_due: bool,
    why: str,
) -> Waiting:
    return Waiting(
        task=task,
        num_files=sum(len(files_of(info)) for info in files),
        num_rows=sum(num_rows[info.key] for info in files),
        since=min(map(_landed, files)).astimezone(lineage.retrain.zone),
        is_due=is_due,
        why=why,
    )


def spent_hours(store: ObjectStore, lineage: WatchedLineage, now: datetime) -> float:
    """Return the hours of the lineage's trainings that have ended in this calendar month.

    Raises:
        StoreError: The versions cannot be read.
    """
    first, following = lineage.retrain.month_of(now)
    versions = Versions(store).all(lineage.lineage)
    return sum(version.train_seconds for version in versions if first <= version.created < following) / 3600


class RowCounts(Stored):
    """The numbers of rows of a task's files in the inbox, so that no file is read twice to be counted."""

    files: dict[str, tuple[str, int]] = Field(default_factory=dict)
    """ETag and number of rows by key; 0 if the file cannot be read or has no row."""


def _count(store: ObjectStore, inbox: InboxLook, files: Iterable[ObjectInfo]) -> dict[str, int]:
    """Return the number of rows of each file by its key; 0: it cannot be read, or has no row."""
    found: dict[str, int] = {}
    unknown: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in files:
        known = _counted.get((store.uri, info.key, info.etag))
        if known is None:
            unknown[keys.task_of(info.key)].append(info)
        else:
            found[info.key] = known
    for task, infos in unknown.items():
        found |= _count_of(store, task, infos, {info.key for info in inbox.arrivals})
    _counted.update({(store.uri, info.key, info.etag): found[info.key] for info in files})
    return found


def _count_of(store: ObjectStore, task: str, files: Sequence[ObjectInfo], present: set[str]) -> dict[str, int]:
    """Count the rows of a task's files that no look has counted, and note the numbers in the store."""
    remedy = "Delete it: the rows are counted again."
    noted = read_stored(store, keys.counts_key(task), RowCounts, what="numbers of rows", remedy=remedy) or RowCounts()
    found = {}
    for info in files:
        etag, num_rows = noted.files.get(info.key, ("", 0))
        found[info.key] = num_rows if etag == info.etag else _rows_of(store, info.key)
    counts = {key: noted.files[key] for key in noted.files if key in present}
    counts |= {info.key: (info.etag, found[info.key]) for info in files}
    if counts != noted.files:
        with suppress(StoreError):  # `deal status` may have no right to write
            write_stored(store, keys.counts_key(task), RowCounts(files=counts))
    return found


def _rows_of(store: ObjectStore, key: str) -> int:
    try:
        with local_files(store, store.uri_of(key)) as files:
            return sum(count_rows(file.path) for file in files)
    except DataValidationError:
        return 0
