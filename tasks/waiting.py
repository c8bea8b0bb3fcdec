"""What a lineage has to learn now, and what waits: the settings `retrain`, asked about the arrivals in the inbox.

Arrivals of one task that are learned together are a batch, fixed before the training begins. A batch is an object of
the store, written with a conditional put. So a file that lands after a crash does not change the run that starts again:
it takes the open batch first. A batch ends when the outcome of its files is noted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel, Field

from deal_core.data.reading.readers import count_rows
from deal_core.errors import DataValidationError, StoreError
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, read_stored, write_stored
from infra.versions import Versions
from tasks.data_files import local_files
from tasks.inbox import Arrival, InboxLook, InboxState
from tasks.lineage.retrain import Waiting, WaitingFile, when_to_train
from tasks.lineage.settings import WatchedLineage

Counts = dict[str, tuple[str, int]]
"""ETag and number of rows by an arrival's key; 0 rows: it cannot be read, or has no row."""
_counted: dict[tuple[str, str], Counts] = {}
"""What this process knows of the numbers of rows, by the store's address and the task; see `_count`."""


class BatchFile(BaseModel, frozen=True, extra="forbid"):
    """A file or folder of a batch, with its content."""

    key: str
    etag: str


class Batch(Stored):
    """The arrivals of one task that a lineage learns together."""

    lineage: str
    task: str
    files: tuple[BatchFile, ...]
    """Oldest first."""
    at: datetime
    """When the batch was made."""
    is_split: bool = False
    """Whether its files are learned one after another, because they were refused together."""

    @property
    def key(self) -> str:
        """Key of the batch in the store."""
        return keys.batch_key(self.lineage, self.task)

    def is_of(self, arrivals: Sequence[Arrival]) -> bool:
        """Return whether the batch has exactly these arrivals, with this content."""
        return self.files == _files_of(arrivals)

    def has(self, arrival: Arrival) -> bool:
        """Return whether an arrival is of the batch, with this content."""
        return any((file.key, file.etag) == (arrival.key, arrival.etag) for file in self.files)

    def is_over(self, inbox: InboxLook, state: InboxState, now: datetime) -> bool:
        """Return whether the batch has ended: its files were handled, or one has changed, is gone, or is held."""
        present = {arrival.key: arrival for arrival in inbox.arrivals}
        ended = []
        for file in self.files:
            arrival, note = present.get(file.key), state.files.get(file.key)
            if arrival is None or arrival.etag != file.etag:
                ended.append(True)
            else:  # a failed file that is tried again has not ended, even while its next try is not due
                is_open = state.is_open(arrival, now, retry_now=False)
                ended.append(not is_open and (note is None or note.due() is None))
        return all(ended) if self.is_split else any(ended)


def _files_of(arrivals: Sequence[Arrival]) -> tuple[BatchFile, ...]:
    return tuple(BatchFile(key=arrival.key, etag=arrival.etag) for arrival in arrivals)


def read_batches(store: ObjectStore, lineage: str) -> list[Batch]:
    """Return the batches of a lineage, in the order in which they were made."""
    batches = [_read_batch(store, info.key) for info in store.list(keys.batch_folder(lineage))]
    return sorted(filter(None, batches), key=lambda batch: (batch.at, batch.task))


def freeze_batch(store: ObjectStore, lineage: str, task: str, arrivals: Sequence[Arrival], now: datetime) -> Batch:
    """Fix the arrivals of a task that are learned together; return its batch, which another run may have made."""
    batch = Batch(lineage=lineage, task=task, files=_files_of(arrivals), at=now)
    if write_stored(store, batch.key, batch, if_absent=True):
        return batch
    # None: another run has just ended it
    return _read_batch(store, batch.key) or freeze_batch(store, lineage, task, arrivals, now)


def split_batch(store: ObjectStore, batch: Batch) -> None:
    """Let the files of a batch be learned one after another."""
    write_stored(store, batch.key, batch.model_copy(update={"is_split": True}))


def _read_batch(store: ObjectStore, key: str) -> Batch | None:
    return read_stored(
        store,
        key,
        Batch,
        what="the files that are learned together",
        remedy="Delete it: its files wait again, and what was learned is recognised.",
    )


class Due(NamedTuple):
    """What a lineage has to learn now, at once."""

    files: tuple[Arrival, ...]
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
    def files(self) -> list[Arrival]:
        """The files and folders that are due."""
        return [arrival for due in self.due for arrival in due.files]


def plan(
    store: ObjectStore,
    lineage: WatchedLineage,
    inbox: InboxLook,
    state: InboxState,
    arrivals: Sequence[Arrival],
    now: datetime,
) -> Plan:
    """Decide about a lineage's open arrivals. Open batches come first, then the task with the oldest arrival.

    `arrivals` are the open and complete arrivals of the last look, oldest first.
    """
    if not arrivals:
        return Plan([], ())
    batches = [batch for batch in read_batches(store, lineage.lineage) if not batch.is_over(inbox, state, now)]
    members = [tuple(arrival for arrival in arrivals if batch.has(arrival)) for batch in batches]
    due: list[Due] = []
    for batch, own in zip(batches, members, strict=True):
        if batch.is_split:
            due += [Due((arrival,), batch) for arrival in own]
        elif len(own) == len(batch.files):
            due.append(Due(own, batch))
    others = [arrival for arrival in arrivals if not any(batch.has(arrival) for batch in batches)]
    if not lineage.retrain.may_wait:
        behind = {batch.task for batch in batches}  # of a policy that the lineage had before
        return Plan([*due, *(Due((arrival,)) for arrival in others if keys.task_of(arrival.key) not in behind)], ())

    num_rows, waiting = _count(store, inbox, arrivals), []

    def describe(task: str, files: Sequence[Arrival], is_due: bool, why: str) -> Waiting:
        return Waiting(
            task=task,
            num_files=sum(len(arrival.files) for arrival in files),
            num_rows=sum(num_rows[arrival.key] for arrival in files),
            since=min(arrival.landed for arrival in files).astimezone(lineage.retrain.zone),
            is_due=is_due,
            why=why,
        )

    def spent_hours() -> float:
        """The hours of the lineage's trainings that have ended in this calendar month."""
        first, following = lineage.retrain.month_of(now)
        versions = Versions(store).all(lineage.lineage)
        return sum(version.train_seconds for version in versions if first <= version.created < following) / 3600

    by_task = _by_task(others)
    for batch, own in zip(batches, members, strict=True):
        if own:  # else it failed, and its next try is not due
            waiting.append(describe(batch.task, own, True, "A run has begun to learn this"))
        if later := by_task.pop(batch.task, []):
            waiting.append(describe(batch.task, later, False, "An earlier batch of the task must end first"))
    for task, files in by_task.items():
        # What cannot be counted is due at once, alone, so that it is refused and holds up nothing.
        due += [Due((arrival,)) for arrival in files if not num_rows[arrival.key]]
        countable = [arrival for arrival in files if num_rows[arrival.key]]
        decided = when_to_train(
            lineage.retrain,
            task,
            [
                WaitingFile(
                    arrival.landed,
                    num_rows[arrival.key],
                    len(arrival.files),
                    is_asked_for=state.noted_as(arrival, "requeued") is not None,
                )
                for arrival in countable
            ],
            now=now,
            spent_hours=spent_hours,
        )
        if decided is not None:
            waiting.append(decided)
            due += [Due(tuple(countable), is_fixed=True)] if decided.is_due else []
    return Plan(due, tuple(waiting))


def _by_task(arrivals: Sequence[Arrival]) -> dict[str, list[Arrival]]:
    by_task: dict[str, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        by_task[keys.task_of(arrival.key)].append(arrival)
    return by_task


class RowCounts(Stored):
    """The numbers of rows of a task's files in the inbox, so that no file is read twice to be counted."""

    files: Counts = Field(default_factory=dict)


def _count(store: ObjectStore, inbox: InboxLook, arrivals: Sequence[Arrival]) -> dict[str, int]:
    """Return the number of rows of each arrival by its key; 0: it cannot be read, or has no row.

    An arrival that no process has counted is read, and the number is noted in the store.
    """
    by_task = _by_task(arrivals)
    present = {arrival.key for arrival in inbox.arrivals}
    for task, files in by_task.items():
        counts = _counted.get((store.uri, task), {})
        if any(counts.get(arrival.key, ("", 0))[0] != arrival.etag for arrival in files):
            remedy = "Delete it: the rows are counted again."
            noted = read_stored(store, keys.counts_key(task), RowCounts, what="numbers of rows", remedy=remedy)
            counts = {key: count for key, count in (noted.files if noted else {}).items() if key in present}
            for arrival in files:
                if counts.get(arrival.key, ("", 0))[0] != arrival.etag:
                    counts[arrival.key] = arrival.etag, _rows_of(store, arrival.key)
            if noted is None or counts != noted.files:
                with suppress(StoreError):  # `deal status` may have no right to write
                    write_stored(store, keys.counts_key(task), RowCounts(files=counts))
            _counted[store.uri, task] = counts
    return {arrival.key: _counted[store.uri, task][arrival.key][1] for task in by_task for arrival in by_task[task]}


def _rows_of(store: ObjectStore, key: str) -> int:
    try:
        with local_files(store, store.uri_of(key)) as files:
            return sum(count_rows(file.path) for file in files)
    except DataValidationError:
        return 0
