"""The state of a lineage: all that changes of it and is not a person's settings file, in one object of the store.

What never changes is an object that is written once: a version, a move of the champion, the end of a branch, a
tombstone, an export. The rest is `lineages/LINEAGE.state.json`, and `update` alone writes it: read, change, write if
nobody else has written meanwhile, else again with what that has written. So no change is lost.

docs/architecture.md has a picture of an arrival's states, and `tasks.arrival_queue` the functions that change them.
What has ended leaves this object for `arrivals/LINEAGE/YEAR.json`, so this object stays small. An arrival is written
there first. If the process dies before it leaves this object, its batch tells the next look that it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, Field

from deal_core.monitoring.report import AlarmKind
from infra.outcomes import Outcome
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, parse_stored, read_stored, reading_stored, update_stored

State = Literal["landed", "waiting", "claimed", "failed", "held"]
"""landed: it may still be written. waiting: it is complete, and not claimed. claimed: a run learns it, or will. failed:
its last try failed. held: it waits for a person."""
_ended: dict[tuple[str, str], tuple[str, EndedArrivals]] = {}
"""Years that this process has read, with their ETags, by the store's address and the key."""


class Content(BaseModel, frozen=True, extra="forbid"):
    """The content of an arrival, and what lay beside it; see `tasks.inbox.Arrival`."""

    etag: str
    written: str
    """A digest of its files' keys, sizes and times, all of which a copy that keeps times has too."""
    content: str | None = None
    """A digest of its files' contents, by which a copy of the store is known; None: nobody has read it for that."""
    beside: str = ""
    """Stamp of the companions."""


class OpenArrival(Content, frozen=True):
    """An arrival that has not ended."""

    state: State
    modified: datetime
    """When the last of its files was changed, or seen first if its clock ran ahead."""
    landed: datetime
    """The same for its time in the inbox, from which waits count."""
    seen: datetime
    """When this content was seen first."""
    num_files: int = 1
    num_rows: int | None = None
    """None: not counted. 0: it cannot be read, or has no row."""
    batch: str | None = None
    """The batch that it is of."""
    why: str = ""
    """Why it failed or is held."""
    is_asked_for: bool = False
    """Whether a person has asked for it, or a consolidation, so that it waits for nothing."""


class Batch(BaseModel, frozen=True, extra="forbid"):
    """The arrivals of one task that a lineage learns together. Without arrivals: a consolidation."""

    id: str
    task: str = ""
    files: tuple[str, ...] = ()
    """Keys of the arrivals, oldest first."""
    is_fixed: bool = False
    """Whether what landed later of the task waits for its end."""
    made: datetime
    attempt: int = 1
    """Number of its claims. Prefect knows a run by the batch and this number."""
    claimed: datetime | None = None
    """When it was claimed; None: it waits for its next try."""
    run: str | None = None
    """Id of the flow run on the Prefect server that learns it; None: none was started, or a process without a server
    learns it."""
    due: datetime | None = None
    """When its next try begins; None: it is claimed, or is tried only if asked."""
    num_failed: int = 0
    """Tries that ended with an error."""
    failed: datetime | None = None
    """When the last of them did."""
    num_lost: int = 0
    """Tries whose process died."""
    num_reader_deaths: int = 0
    """Tries in which a file ended the process that read it."""

    def is_due(self, now: datetime, failed_before: datetime | None = None) -> bool:
        """Return whether its next try begins now; also if a clock has gone back since the last one.

        What failed before `failed_before` is due without a pause.
        """
        if failed_before is not None and (self.failed is None or self.failed < failed_before):
            return True
        return self.due is not None and (now >= self.due or (self.failed is not None and now < self.failed))


class HeldByCheck(BaseModel, frozen=True, extra="forbid"):
    """An arrival whose labels disagree with the champion."""

    task: str
    names: tuple[str, ...]
    """Its files as `deal data release` calls them; see `tasks.lineage.held`."""
    landed_sha256: str
    """Digest of its rows."""
    why: str
    at: datetime
    released: datetime | None = None
    """When a person let it go on; None: it waits."""


class OpenAlarm(BaseModel, frozen=True, extra="forbid"):
    """An alarm that was announced and is not over."""

    task: str
    kind: AlarmKind
    since: datetime
    """Time of the look that found it."""
    look: int
    """Number of that look."""
    reasons: tuple[str, ...]
    """Of the last look that found it."""

    def identity(self, version: str) -> str:
        """Return what tells the alarm from others of its lineage and kind.

        The day is part of it, since the numbers of the looks begin anew after a damaged state was deleted. The time is
        not, so that a look that is repeated after a crash announces the same alarm.
        """
        return f"{version} {self.task} {self.look} {self.since:%Y-%m-%d}"


class MonitorState(BaseModel, frozen=True, extra="forbid"):
    """The last look at a lineage's live traffic, and what it left open."""

    version: str
    looked: datetime
    num_looks: int
    """Looks at the lineage so far, at all its versions."""
    tasks: dict[str, str]
    """What the look did with each task, in words."""
    alarms: tuple[OpenAlarm, ...] = ()

    def line(self) -> str:
        """Return the state in one line."""
        parts = [f"{alarm.task}: {alarm.kind} since {alarm.since:%Y-%m-%d %H:%M}" for alarm in self.alarms]
        alarmed = {alarm.task for alarm in self.alarms}
        parts += [f"{task}: {outcome}" for task, outcome in self.tasks.items() if task not in alarmed]
        return f"version {self.version}, {self.looked:%Y-%m-%d %H:%M} UTC: {'; '.join(parts) or 'no rows'}"


class LineageState(Stored):
    """All that changes of a lineage; see the module."""

    paused: str | None = None
    """Why the lineage learns nothing that lands; None: it learns."""
    arrivals: dict[str, OpenArrival] = Field(default_factory=dict)
    """Those of the inbox that have not ended, by key, as inbox/TASK/FILE."""
    batches: tuple[Batch, ...] = ()
    """What is learned together, from its first claim to its end, in the order in which they were made. At most one is
    claimed."""
    held: tuple[HeldByCheck, ...] = ()
    """What the arrival check holds or a person has let go on, until a version has learned it."""
    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Task to the labels that `deal task add-label` has added to it, oldest first."""
    renewals: dict[str, str] = Field(default_factory=dict)
    """Task to the dataset with the test rows that its next arrival is to replace, as `deal task renew-tests` says."""
    monitor: MonitorState | None = None
    """None: nobody has looked yet."""

    @property
    def claimed(self) -> Batch | None:
        """The batch that is claimed; None: there is none."""
        return next((batch for batch in self.batches if batch.claimed is not None), None)

    def batch(self, id_: str | None) -> Batch | None:
        """Return the batch with an id; None: it has ended."""
        return next((batch for batch in self.batches if batch.id == id_), None)


class EndedArrival(Content, frozen=True):
    """How an arrival ended. It is valid until the arrival changes."""

    outcome: Outcome
    message: str
    version: str | None = None
    num_tries: int = 1
    """Tries that failed, and the last one."""
    batch: str | None = None
    """The batch that it was learned in."""
    at: datetime


class EndedArrivals(Stored):
    """The arrivals of a lineage that ended in a year, by key."""

    arrivals: dict[str, EndedArrival] = Field(default_factory=dict)


def _words(lineage: str) -> dict[str, str]:
    return {
        "what": f"the state of lineage '{lineage}'",
        "remedy": "Restore it from a backup of the store. Or delete it: what has landed and was not learned is learned "
        "anew, but a pause, held arrivals, added labels and requests for new test rows are lost.",
    }


def read_state(store: ObjectStore, lineage: str) -> LineageState:
    """Return the state of a lineage; of a new one an empty state."""
    return read_stored(store, keys.state_key(lineage), LineageState, **_words(lineage)) or LineageState()


def update(store: ObjectStore, lineage: str, change: Callable[[LineageState], LineageState]) -> LineageState:
    """Change the state of a lineage, and lose no change of another process; return the new state.

    `change` is called again with another state if another process has written meanwhile. It must do nothing else.
    """
    return update_stored(store, keys.state_key(lineage), LineageState, change, **_words(lineage))


def lineages_with_state(store: ObjectStore) -> list[str]:
    """Return the names of the lineages with a state, in alphabetical order."""
    end = keys.file_name(keys.state_key(""))
    names = [keys.file_name(info.key) for info in store.list(keys.LINEAGES)]
    return sorted(name.removesuffix(end) for name in names if name.endswith(end))


_ENDED_WORDS = {
    "what": "the arrivals that ended in a year",
    "remedy": "Restore it from a backup of the store. Or pause the lineage and delete it: what was learned is "
    "recognised, but arrivals that were rejected are tried again.",
}


def read_ended(store: ObjectStore, lineage: str) -> dict[str, EndedArrival]:
    """Return how arrivals ended, by key; of one that landed several times the last end. Only what is new is read."""
    ended: dict[str, EndedArrival] = {}
    for info in store.list(keys.ended_folder(lineage)):  # the keys sort by year
        etag, year = _ended.get((store.uri, info.key), ("", EndedArrivals()))
        if etag != info.etag:
            with reading_stored(store, info.key, **_ENDED_WORDS):
                year = parse_stored(store.get_bytes(info.key), EndedArrivals)
            _ended[store.uri, info.key] = info.etag, year  # what is written after the listing is read at the next call
        ended |= year.arrivals
    return ended


def note_ended(
    store: ObjectStore, lineage: str, arrivals: Mapping[str, EndedArrival], gone: frozenset[str] = frozenset()
) -> None:
    """Note how arrivals have ended, by key. Forget those `gone` of which no version came: nothing names them."""

    def add(year: EndedArrivals) -> EndedArrivals:
        kept = {key: end for key, end in year.arrivals.items() if end.version is not None or key not in gone}
        return year.model_copy(update={"arrivals": kept | dict(arrivals)})

    key = keys.ended_key(lineage, datetime.now(UTC).year)
    update_stored(store, key, EndedArrivals, add, **_ENDED_WORDS)


def rewrite_ended(store: ObjectStore, lineage: str, rewrite: Callable[[str, EndedArrival], EndedArrival]) -> None:
    """Write notes about ended arrivals anew. `rewrite` gets the key and the note of each, and may return the same."""

    def change(year: EndedArrivals) -> EndedArrivals:
        arrivals = {key: rewrite(key, end) for key, end in year.arrivals.items()}
        return year.model_copy(update={"arrivals": arrivals})

    for info in list(store.list(keys.ended_folder(lineage))):
        update_stored(store, info.key, EndedArrivals, change, **_ENDED_WORDS)
