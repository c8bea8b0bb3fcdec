"""Batches: the files of one task that a lineage learns together, fixed before the training begins.

A batch is an object of the store, written with a conditional put. So a file that lands after a crash does not change
the run that starts again: it takes the open batch first. A batch ends when the outcome of its files is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel

from infra.store import keys
from infra.store.base import ObjectInfo, ObjectStore
from infra.store.stored import Stored, read_stored
from tasks.inbox import InboxLook, InboxState


class BatchFile(BaseModel, frozen=True, extra="forbid"):
    """A file of a batch, with its content."""

    key: str
    etag: str


class Batch(Stored):
    """The files of one task that a lineage learns together."""

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

    def is_of(self, files: Sequence[ObjectInfo]) -> bool:
        """Return whether the batch has exactly these files, with this content."""
        return self.files == _as_files(files)

    def has(self, info: ObjectInfo) -> bool:
        """Return whether a file is of the batch, with this content."""
        return BatchFile(key=info.key, etag=info.etag) in self.files

    def is_over(self, inbox: InboxLook, state: InboxState, now: datetime) -> bool:
        """Return whether the batch has ended: its files were handled, or one has changed, is gone, or is held."""
        present = {info.key: info for info in inbox.arrivals}
        infos = [present.get(file.key) for file in self.files]
        ended = [
            info is None or info.etag != file.etag or _is_closed(state, info, inbox.stamp(info), now)
            for file, info in zip(self.files, infos, strict=True)
        ]
        return all(ended) if self.is_split else any(ended)


def _as_files(infos: Sequence[ObjectInfo]) -> tuple[BatchFile, ...]:
    return tuple(BatchFile(key=info.key, etag=info.etag) for info in infos)


def _is_closed(state: InboxState, info: ObjectInfo, beside: str, now: datetime) -> bool:
    """Whether a file has an outcome, after which it is not tried again."""
    known = state.files.get(info.key)
    return not state.is_open(info, now, beside=beside, retry_now=False) and (known is None or known.due() is None)


def read_batches(store: ObjectStore, lineage: str) -> list[Batch]:
    """Return the batches of a lineage, in the order in which they were made.

    Raises:
        StoreError: A batch is damaged, or another release wrote it.
    """
    found = [_read(store, info.key) for info in store.list(keys.batch_folder(lineage))]
    return sorted(filter(None, found), key=lambda batch: (batch.at, batch.task))


def freeze(store: ObjectStore, lineage: str, task: str, files: Sequence[ObjectInfo], now: datetime) -> Batch:
    """Fix the files of a task that are learned together; return the task's batch, which another run may have made."""
    batch = Batch(lineage=lineage, task=task, files=_as_files(files), at=now)
    if store.put_bytes(batch.key, _as_json(batch), if_absent=True):
        return batch
    return _read(store, batch.key) or freeze(store, lineage, task, files, now)  # another run has just ended it


def split(store: ObjectStore, batch: Batch) -> None:
    """Let the files of a batch be learned one after another."""
    store.put_bytes(batch.key, _as_json(batch.model_copy(update={"is_split": True})))


def end(store: ObjectStore, batch: Batch) -> None:
    """Remove a batch that is over."""
    store.delete(batch.key)


def _as_json(batch: Batch) -> bytes:
    return (batch.model_dump_json(indent=2) + "\n").encode()


def _read(store: ObjectStore, key: str) -> Batch | None:
    return read_stored(
        store,
        key,
        Batch,
        what="the files that are learned together",
        remedy="Delete it: its files wait again, and what was learned is recognised.",
    )
