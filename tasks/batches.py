"""Batches: the arrivals of one task that a lineage learns together, fixed before the training begins.

A batch is an object of the store, written with a conditional put. So a file that lands after a crash does not change
the run that starts again: it takes the open batch first. A batch ends when the outcome of its files is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel

from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, read_stored, write_stored
from tasks.inbox import Arrival, InboxLook, InboxState


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
    """Return the batches of a lineage, in the order in which they were made.

    Raises:
        StoreError: A batch is damaged, or another release wrote it.
    """
    batches = [_read(store, info.key) for info in store.list(keys.batch_folder(lineage))]
    return sorted(filter(None, batches), key=lambda batch: (batch.at, batch.task))


def freeze(store: ObjectStore, lineage: str, task: str, arrivals: Sequence[Arrival], now: datetime) -> Batch:
    """Fix the arrivals of a task that are learned together; return its batch, which another run may have made."""
    batch = Batch(lineage=lineage, task=task, files=_files_of(arrivals), at=now)
    if store.put_bytes(batch.key, (batch.model_dump_json(indent=2) + "\n").encode(), if_absent=True):
        return batch
    return _read(store, batch.key) or freeze(store, lineage, task, arrivals, now)  # another run has just ended it


def split(store: ObjectStore, batch: Batch) -> None:
    """Let the files of a batch be learned one after another."""
    write_stored(store, batch.key, batch.model_copy(update={"is_split": True}))


def end(store: ObjectStore, batch: Batch) -> None:
    """Remove a batch that is over."""
    store.delete(batch.key)


def _read(store: ObjectStore, key: str) -> Batch | None:
    return read_stored(
        store,
        key,
        Batch,
        what="the files that are learned together",
        remedy="Delete it: its files wait again, and what was learned is recognised.",
    )
