"""The inbox: which files have landed, which are complete, and what became of each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from deal_core.errors import StoreError
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore
from infra.store.keys import TASK_FILE, task_file_of, task_of

PAUSE = timedelta(seconds=60)
"""Before the second try of what may succeed later (a server was away, say); see `growing_pause`."""
MAX_DOUBLINGS = 6

Outcome = Literal["promoted", "awaiting approval", "rejected", "repeat", "refused", "failed"]


def growing_pause(num_before: int) -> timedelta:
    """Pause after a try that had so many before it: a minute, then twice as long each time, up to about an hour."""
    return PAUSE * (1 << min(num_before, MAX_DOUBLINGS))


class Handled(BaseModel):
    """What became of one file; stands until its content changes, and of a failed run until it is tried again."""

    model_config = ConfigDict(extra="forbid")

    etag: str
    outcome: Outcome
    message: str
    version: str | None = None
    num_tries: int = 1
    beside: str = ""
    """Stamp of the task file and the test rows that it was read with."""
    is_final: bool = False
    """Of a failed run: it would fail again, so nothing tries it again unasked."""
    at: datetime

    def due(self) -> datetime | None:
        """When a watch that goes on tries the file again; None: never, as nothing but a change can help."""
        is_hopeful = self.outcome == "failed" and not self.is_final
        return self.at + growing_pause(self.num_tries - 1) if is_hopeful else None


class InboxState(BaseModel):
    """The files that a lineage's watch has handled, by key."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    files: dict[str, Handled] = {}

    def is_open(self, info: ObjectInfo, now: datetime, *, beside: str = "", retry_now: bool) -> bool:
        """Whether this content of the file has to be handled.

        Args:
            info: the file as it is now.
            now: the time.
            beside: stamp of what lies beside it; a file that was of no use may be good with another task file.
            retry_now: also when its run failed before, however lately: somebody asked for it.
        """
        handled = self.files.get(info.key)
        if handled is None or handled.etag != info.etag:
            return True
        if handled.outcome in ("refused", "failed") and handled.beside != beside:
            return True
        if handled.outcome == "failed" and retry_now:
            return True
        due = handled.due()
        return due is not None and now >= due

    def record(
        self, info: ObjectInfo, outcome: Outcome, message: str, *,
        now: datetime, beside: str = "", version: str | None = None, is_final: bool = False,
    ) -> Handled:
        """Note what became of a file."""
        before = self.files.get(info.key)
        is_retry = before and (before.etag, before.beside, before.outcome) == (info.etag, beside, "failed")
        num_tries = before.num_tries + 1 if before and is_retry else 1
        handled = Handled(
            etag=info.etag, outcome=outcome, message=message, version=version, num_tries=num_tries, beside=beside,
            is_final=is_final, at=now,
        )  # fmt: skip
        self.files[info.key] = handled
        return handled

    def drop_gone(self, store: ObjectStore) -> None:
        """Drop what is noted of files that are gone and that no version came of; the others still have names."""
        gone = [key for key, handled in self.files.items() if handled.version is None and not store.exists(key)]
        for key in gone:
            del self.files[key]


def read_state(store: ObjectStore, lineage: str) -> InboxState:
    """The state of a lineage's watch; empty when it never ran.

    Raises:
        StoreError: the state cannot be understood.
    """
    key = keys.watch_key(lineage)
    try:
        return InboxState.model_validate(json.loads(store.get_bytes(key)))
    except ObjectNotFoundError:
        return InboxState()
    except (ValueError, ValidationError):
        raise StoreError(
            f"{store.uri_of(key)} is no state of a watch; delete it, and every file in the inbox is looked at again "
            "(what was adapted is still not adapted twice)."
        ) from None


class KnownStates:
    """What watches have handled, for whoever looks often and changes nothing: read again only when it has changed."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[str, InboxState]] = {}

    def read(self, store: ObjectStore, lineage: str) -> InboxState:
        """As `read_state`."""
        info = store.find(keys.watch_key(lineage))
        if info is None:
            return InboxState()
        known = self._read.get(lineage)
        if known is None or known[0] != info.etag:  # what is written in between is newer than its mark: read once more
            known = self._read[lineage] = (info.etag, read_state(store, lineage))
        return known[1]


def write_state(store: ObjectStore, lineage: str, state: InboxState) -> None:
    """Keep the state of a lineage's watch."""
    store.put_bytes(keys.watch_key(lineage), (state.model_dump_json(indent=2) + "\n").encode())


def list_arrivals(listing: Iterable[ObjectInfo], companions: Iterable[str] = ()) -> list[ObjectInfo]:
    """Files at inbox/<task>/<file>, oldest first.

    Args:
        listing: everything in the inbox.
        companions: keys of files that belong to an arrival and are none of their own, such as test rows.
    """
    skipped = set(companions)
    arrivals = [info for info in listing if keys.is_arrival(info.key) and info.key not in skipped]
    return sorted(arrivals, key=lambda info: (info.modified, info.key))


def misplaced_keys(listing: Iterable[ObjectInfo], companions: Iterable[str] = ()) -> dict[str, str]:
    """The keys too deep in the inbox, or not deep enough, to be looked at: what is wrong with each, and what to do.

    Hidden files and task files are none of them, wherever they lie.

    Args:
        listing: everything in the inbox.
        companions: as for `list_arrivals`.
    """
    skipped = set(companions)
    problems = ((info.key, _misplacement(info.key)) for info in listing if info.key not in skipped)
    return {key: problem for key, problem in problems if problem is not None}


class Beside(NamedTuple):
    """A task's file and its test rows: a stamp that changes when either does, and when the last one did."""

    stamp: str
    modified: datetime


def list_beside(listing: Iterable[ObjectInfo], companions: Iterable[str] = ()) -> dict[str, Beside]:
    """What lies beside the arrivals of every task that has a task file.

    Args:
        listing: everything in the inbox.
        companions: keys of the files of test rows.
    """
    named = set(companions)
    found: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in sorted(listing, key=lambda info: info.key):
        if info.key in named or info.key == task_file_of(info.key):
            found[task_of(info.key)].append(info)
    return {
        task: Beside(" ".join(info.etag for info in infos), max(info.modified for info in infos))
        for task, infos in found.items()
    }


def split_settled(
    arrivals: Iterable[ObjectInfo], seen: Mapping[str, str], now: datetime, settle_seconds: float,
    beside: Mapping[str, Beside] | None = None,
) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    """Part arrivals into those that are complete and those that may still be written.

    A file is complete when it has not changed since the previous look, or for `settle_seconds`.

    Args:
        arrivals: what is there now.
        seen: `stamp_of` by key at the previous look.
        now: the time.
        settle_seconds: how long a file must have been left alone.
        beside: what lies beside the arrivals of a task; it must have been left alone as long.
    """
    settled: list[ObjectInfo] = []
    growing: list[ObjectInfo] = []
    for info in arrivals:
        other = (beside or {}).get(task_of(info.key))
        changed = max(info.modified, other.modified) if other else info.modified
        is_old = now - changed.astimezone(UTC) >= timedelta(seconds=settle_seconds)
        is_same = seen.get(info.key) == stamp_of(info, other)
        (settled if is_old or is_same else growing).append(info)
    return settled, growing


def stamp_of(info: ObjectInfo, beside: Beside | None) -> str:
    """What a look at a file remembers of it and of what lies beside it."""
    return info.etag if beside is None else f"{info.etag} {beside.stamp}"


def _misplacement(key: str) -> str | None:
    folder, *names = key.split("/")
    if len(names) == 2 or names[-1] == TASK_FILE or any(name.startswith(".") for name in names):
        return None
    if len(names) == 1:
        return f"lies in no task's folder; move it to {folder}/TASK/{names[0]}"
    return (
        f"lies in a folder within its task's folder, where nothing is looked for; move it to {folder}/{names[0]}/"
        f"{'-'.join(names[1:])}"
    )
