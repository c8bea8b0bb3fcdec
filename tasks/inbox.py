"""The inbox: the arrivals that have landed, and the state of each for a lineage's watch.

A file at inbox/TASK/FILE is an arrival, and so is a folder at inbox/TASK/FOLDER with all its files. The task file
`inbox/TASK/task.yaml` and the file or folder of test rows that it names are companions: they belong to the task's
arrivals.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, field_validator

from deal_core.errors import ConfigError, StoreError
from deal_core.yaml_file import MAX_BYTES, read_yaml, yaml_mapping
from infra.settings import InboxSettings
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore, UnusableObjectError, check_key
from infra.store.keys import INBOX, SUCCESS_FILE, TASK_FILE, task_file_of, task_of
from infra.store.stored import Stored, read_stored, write_stored
from tasks.lineage.held import held_by_check
from tasks.spec import TaskFields, TaskSpec, parse, reading_the_task

PAUSE = timedelta(seconds=60)
"""Pause before the second try after a failure that may pass; see `growing_pause`."""
MAX_DOUBLINGS = 6
MAX_READER_DEATHS = 2
"""Tries of a file that ends the process that reads it. The first may have been for want of memory."""

Outcome = Literal[
    "promoted", "awaiting approval", "rollout", "rejected", "repeat", "skipped", "refused", "failed", "held", "requeued"
]

_states: dict[tuple[str, str], tuple[str, InboxState]] = {}
"""States that this process has read, with their ETags, by the store's address and the lineage; see `known_state`."""
_test_data: dict[tuple[str, str, str], str | None] = {}
"""What task files name as test rows, by the store's address, the task file's key and its ETag."""


def growing_pause(num_before: int) -> timedelta:
    """Return the pause after a try. It starts at a minute and doubles with every earlier try, up to about an hour."""
    return PAUSE * (1 << min(num_before, MAX_DOUBLINGS))


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A file that has landed, or a folder with all its files; and what lies beside it."""

    key: str
    files: tuple[ObjectInfo, ...]
    """The files with its rows, in the order of their keys."""
    is_marked: bool = False
    """Whether a file `_SUCCESS` says that the folder is complete."""
    companions: tuple[ObjectInfo, ...] = ()
    """The task file and the files with test rows, in the order of their keys."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.files[0].key != self.key

    @property
    def waits_for_quiet(self) -> bool:
        """Whether it is complete only when nothing has changed for some time: a folder without a mark."""
        return self.is_folder and not self.is_marked

    @cached_property
    def etag(self) -> str:
        """The ETag of the file; of a folder a digest of its files' keys and ETags."""
        if not self.is_folder:
            return self.files[0].etag
        lines = "".join(f"{info.key}\n{info.etag}\n" for info in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()[:32]

    @property
    def stamp(self) -> str:
        """What changes with the contents of the companions."""
        return " ".join(info.etag for info in self.companions)

    @property
    def modified(self) -> datetime:
        """When the last of its files was changed. A copy may keep the times of its original."""
        return max(info.modified for info in self.files)

    @property
    def landed(self) -> datetime:
        """When the last of its files came into the inbox."""
        return max(info.landed or info.modified for info in self.files)


class Handled(BaseModel, extra="forbid"):
    """The result for one arrival. It is valid until the arrival changes or a failed one is tried again."""

    etag: str
    outcome: Outcome
    message: str
    version: str | None = None
    num_tries: int = 1
    beside: str = ""
    """Stamp of the companions when the arrival was read."""
    is_final: bool = False
    """Whether a failed file would fail again, so that a watch does not try it again."""
    num_reader_deaths: int = 0
    """Number of the tries in which the file ended the process that read it."""
    at: datetime
    cancelled_run: str | None = None
    """Id of the cancelled run that held the file; see `tasks.arrival_runs`."""

    def due(self) -> datetime | None:
        """Return the time of the next try; None: a watch does not try the file again."""
        is_hopeful = self.outcome == "failed" and not self.is_final
        return self.at + growing_pause(self.num_tries - 1) if is_hopeful else None


class InboxState(Stored):
    """The arrivals that a lineage's watch has handled, by key."""

    files: dict[str, Handled] = Field(default_factory=dict)

    def is_open(self, arrival: Arrival, now: datetime, *, retry_now: bool) -> bool:
        """Return whether the watch has to handle this content of an arrival.

        An arrival whose hold a person ended is open too. A failed one may succeed with other companions. With
        `retry_now`, a failed one is tried again without a pause.
        """
        handled = self.files.get(arrival.key)
        if handled is None or handled.etag != arrival.etag or handled.outcome == "requeued":
            return True
        if handled.outcome in ("refused", "failed") and handled.beside != arrival.stamp:
            return True
        if handled.outcome == "failed" and retry_now:
            return True
        due = handled.due()
        return due is not None and (now >= due or now < handled.at)  # the clock may have gone back

    def record(
        self,
        arrival: Arrival,
        outcome: Outcome,
        message: str,
        *,
        now: datetime,
        version: str | None = None,
        is_final: bool = False,
        has_killed_reader: bool = False,
        cancelled_run: str | None = None,
    ) -> Handled:
        """Note the result for an arrival. One that has killed its reader MAX_READER_DEATHS times is refused."""
        before = self.files.get(arrival.key)
        if before and (before.etag, before.beside, before.outcome) != (arrival.etag, arrival.stamp, "failed"):
            before = None
        num_deaths = (before.num_reader_deaths if before else 0) + has_killed_reader
        if has_killed_reader and num_deaths >= MAX_READER_DEATHS:
            outcome = "refused"
            message = f"{message} It did so in {num_deaths} tries, so it is set aside until it changes."
        handled = Handled(
            etag=arrival.etag,
            outcome=outcome,
            message=message,
            version=version,
            num_tries=before.num_tries + 1 if before else 1,
            beside=arrival.stamp,
            is_final=is_final,
            num_reader_deaths=num_deaths,
            at=now,
            cancelled_run=cancelled_run,
        )
        self.files[arrival.key] = handled
        return handled

    def noted_as(self, arrival: Arrival, outcome: Outcome) -> Handled | None:
        """Return the note of an arrival if its content has this outcome, such as "held" or "requeued"."""
        handled = self.files.get(arrival.key)
        return handled if handled and (handled.outcome, handled.etag) == (outcome, arrival.etag) else None

    def gone(self, store: ObjectStore) -> list[str]:
        """Return the keys of arrivals that are gone and whose notes have no version. Others name the arrival."""
        return [key for key, note in self.files.items() if note.version is None and not find_landed(store, key)]


def read_state(store: ObjectStore, lineage: str) -> InboxState:
    """Read the state of a lineage's watch. A watch that never ran has an empty state."""
    state = read_stored(
        store,
        keys.watch_key(lineage),
        InboxState,
        what="the state of a watch",
        remedy="Restore it from a backup. Or hold the lineage, then delete it: what was learned is recognised, but "
        "arrivals that were rejected or held are tried again.",
    )
    return state or InboxState()


def known_state(store: ObjectStore, lineage: str) -> InboxState:
    """Do the same as `read_state`, but read only what has changed: for callers that look often and change nothing."""
    info = store.find(keys.watch_key(lineage))
    if info is None:
        return InboxState()
    etag, state = _states.get((store.uri, lineage), ("", InboxState()))
    if etag != info.etag:
        state = read_state(store, lineage)
        _states[store.uri, lineage] = info.etag, state  # a state written after `find` is read again at the next call
    return state


def write_state(store: ObjectStore, lineage: str, state: InboxState) -> None:
    """Write the state of a lineage's watch."""
    write_stored(store, keys.watch_key(lineage), state)


def list_arrivals(listing: Iterable[ObjectInfo], test_data: Collection[str] = ()) -> list[Arrival]:
    """Return the arrivals in a listing of the inbox, oldest first. `test_data` has the keys of tasks' test rows."""
    not_learned = {keys.top_of(key) for key in test_data}
    files: dict[str, list[ObjectInfo]] = defaultdict(list)
    companions: dict[str, list[ObjectInfo]] = defaultdict(list)
    marked = set()
    for info in listing:
        arrival = keys.arrival_of(info.key)
        if arrival is not None and arrival not in not_learned:
            files[arrival].append(info)
        if keys.file_name(info.key) == SUCCESS_FILE:
            marked.add(info.key.removesuffix(f"/{SUCCESS_FILE}"))
        if info.key == task_file_of(info.key) or _is_within(info.key, test_data):
            companions[task_of(info.key)].append(info)
    arrivals = [
        Arrival(
            key=key, files=tuple(infos), is_marked=key in marked, companions=tuple(companions.get(task_of(key), ()))
        )
        for key, infos in files.items()
    ]
    return sorted(arrivals, key=lambda arrival: (arrival.modified, arrival.key))


def find_landed(store: ObjectStore, key: str) -> Arrival | None:
    """Return the file or the folder that has landed under a key, without its companions; None: nothing has."""
    info = store.find(key)
    return Arrival(key=key, files=(info,)) if info else next(iter(list_arrivals(store.list(key))), None)


def _is_within(key: str, places: Collection[str]) -> bool:
    """Whether a key is one of these, or of a file in a folder that is one of these."""
    return any(key == place or key.startswith(f"{place}/") for place in places)


def _misplacement(key: str, test_data: Collection[str]) -> str | None:
    """Why a key is in a wrong folder, and the remedy; None: it is not. Hidden files and task files do not count."""
    folder, *names = key.split("/")
    if names[-1] == TASK_FILE or any(name.startswith(".") for name in names) or _is_within(key, test_data):
        return None
    if len(names) == 1:
        return f"is not in a task's folder; move it to {folder}/TASK/{names[0]}"
    if len(names) > 2 and keys.top_of(key) in map(keys.top_of, test_data):
        return "is in a folder with the task's test rows, which is no arrival; move it to a folder of its own"
    return None


class TaskFile(TaskFields):
    """`inbox/TASK/task.yaml`: settings of a task, which can be there before its first arrival."""

    test_data: str | None = None
    """Name of the file or folder with the test rows, in the same folder."""

    @field_validator("test_data")
    @classmethod
    def _lies_beside(cls, name: str | None) -> str | None:
        try:
            return name if name is None else check_key(name)
        except StoreError:
            raise ValueError("no file in the task's folder has this name; give one such as test.jsonl") from None


@dataclass(frozen=True)
class InboxLook:
    """The content of the inbox at one moment."""

    arrivals: tuple[Arrival, ...]
    """Oldest first."""
    misplaced: Mapping[str, str]
    """Keys in a wrong folder, with the problem of each."""

    def of(self, tasks: Collection[str]) -> list[Arrival]:
        """Return the arrivals of these tasks, oldest first; without tasks: all arrivals."""
        return [arrival for arrival in self.arrivals if not tasks or task_of(arrival.key) in tasks]

    def open_for(self, state: InboxState, tasks: Collection[str], *, retry_now: bool) -> list[Arrival]:
        """Return the arrivals of these tasks that a lineage has to handle. For `retry_now` see `InboxState.is_open`."""
        now = datetime.now(UTC)
        return [arrival for arrival in self.of(tasks) if state.is_open(arrival, now, retry_now=retry_now)]


def look(store: ObjectStore) -> InboxLook:
    """List the inbox once for all lineages. Each misplaced file is logged once."""
    listing = list(store.list(INBOX))
    test_data = set()
    for info in [info for info in listing if info.key == task_file_of(info.key)]:
        place, task = (store.uri, info.key, info.etag), task_of(info.key)
        try:
            name = _test_data[place] if place in _test_data else _read_task_file(store, info.key).test_data
        except ConfigError:
            name = None  # `task_spec` reports the error for every arrival of the task
        except StoreError as error:  # its test rows must not become an arrival
            store.warn_once(info.key, f"Task '{task}' learns nothing, as its task file cannot be read: {error}")
            listing = [other for other in listing if task_of(other.key) != task]
            continue
        _test_data[place] = name
        test_data |= {f"{keys.inbox_folder(task)}/{name}"} if name else set()
    problems = ((info.key, _misplacement(info.key, test_data)) for info in listing)
    misplaced = {key: problem for key, problem in problems if problem is not None}
    for key, problem in misplaced.items():
        store.warn_once(key, f"Skipped {key!r}: it {problem}.")
    return InboxLook(tuple(list_arrivals(listing, test_data)), misplaced)


class Settled(NamedTuple):
    """A lineage's open arrivals: complete ones, oldest first, and those that may still be written."""

    complete: list[Arrival]
    growing: list[Arrival]


def settle(
    inbox: InboxLook,
    state: InboxState,
    tasks: Collection[str],
    stamps: dict[str, str],
    *,
    settle_seconds: float,
    retry_now: bool,
) -> Settled:
    """Return the arrivals of a look that a lineage has to handle. Without tasks, all tasks count.

    A file is complete if it and its companions have not changed since the previous look, or for `settle_seconds`. So is
    a folder with a file `_SUCCESS`. Another folder is complete if it has not changed for DEAL_INBOX_SETTLE_SECONDS,
    because the pause between two of its files may be longer than that between two looks. `stamps` has the stamps of the
    previous look by key; the call replaces them. For `retry_now` see `InboxState.is_open`.
    """
    settled, now, before = Settled([], []), datetime.now(UTC), dict(stamps)
    quiet_seconds = InboxSettings().inbox_settle_seconds
    stamps.clear()
    for arrival in inbox.open_for(state, tasks, retry_now=retry_now):
        waits = arrival.waits_for_quiet
        own = arrival.landed if waits else arrival.modified
        changed = max([own, *(info.modified for info in arrival.companions)])
        stamps[arrival.key] = f"{arrival.etag} {arrival.stamp}".strip()
        is_old = now - changed.astimezone(UTC) >= timedelta(seconds=quiet_seconds if waits else settle_seconds)
        is_same = not waits and before.get(arrival.key) == stamps[arrival.key]
        (settled.complete if is_old or is_same else settled.growing).append(arrival)
    return settled


class HeldArrival(BaseModel, frozen=True):
    """An arrival that waits for `deal data release`: a run was cancelled, or labels disagree with the champion."""

    key: str
    """The arrival, as inbox/TASK/FILE; the address of a file that was learned from elsewhere."""
    task: str
    why: str

    def line(self, lineage: str) -> str:
        """Return it in one line, with the command that lets it go on."""
        command = f"deal data release {shlex.quote(self.key)} --lineage {lineage}"
        return f"{self.key} is held: {self.why} Let it go on with: {command}"


def held_arrivals(inbox: InboxLook, state: InboxState, tasks: Collection[str] = ()) -> tuple[HeldArrival, ...]:
    """Return the arrivals of these tasks that are held, oldest first; without tasks: all of them."""
    notes = ((arrival.key, state.noted_as(arrival, "held")) for arrival in inbox.of(tasks))
    return tuple(HeldArrival(key=key, task=task_of(key), why=note.message) for key, note in notes if note)


def find_held(store: ObjectStore, lineage: str) -> tuple[HeldArrival, ...]:
    """Return all held arrivals of a lineage: those of the inbox, then files from elsewhere, each oldest first."""
    state = read_state(store, lineage)
    is_held = any(note.outcome == "held" for note in state.files.values())
    return (*(held_arrivals(look(store), state) if is_held else ()), *held_elsewhere(store, lineage))


def held_elsewhere(store: ObjectStore, lineage: str) -> tuple[HeldArrival, ...]:
    """Return the held arrivals whose files are not in the inbox, oldest first."""
    return tuple(
        HeldArrival(key=name, task=held.task, why=held.why)
        for held in held_by_check(store, lineage)
        for name in held.names
        if not name.startswith(f"{INBOX}/")
    )


def task_spec(store: ObjectStore, *arrivals: str) -> TaskSpec:
    """Make the spec of what is learned at once from the keys of its arrivals, which are of one task, and its task file.

    Raises:
        TaskFieldsError: The task file is damaged or has a setting that is not valid.
    """
    task = task_of(arrivals[0])
    with reading_the_task():
        first, *others = map(store.uri_of, arrivals)
        fields = _read_task_file(store, task_file_of(arrivals[0]))
        tests = fields.test_data and store.uri_of(f"{keys.inbox_folder(task)}/{fields.test_data}")
        return _make_spec(fields, task, (first, *others) if others else first, tests, first)


def task_from_file(path: Path, file: str) -> TaskSpec:
    """Make the spec of a file on this machine from the task file in its folder. The folder's name is the task's name.

    Raises:
        ConfigError: The task file is damaged or has a setting that is not valid.
    """
    folder = path.parent
    try:
        fields = parse(TaskFile, read_yaml(path), str(path))
        tests = fields.test_data and str(folder / fields.test_data)
        return _make_spec(fields, folder.name, file, tests, f"{path}, with the folder's name as the task's name")
    except ConfigError as error:
        raise ConfigError(f"{error} If {TASK_FILE} is not about this file, name the task with --task.") from None


def _make_spec(
    fields: TaskFile, name: str, data: str | tuple[str, ...], test_data: str | None, origin: str
) -> TaskSpec:
    """The spec of an arrival, from a task file and the addresses of its rows."""
    tests = {"test_data": test_data} if test_data else {}
    return parse(TaskSpec, {"name": name, "data": data, **fields.given(), **tests}, origin)


def _read_task_file(store: ObjectStore, key: str) -> TaskFile:
    try:
        content = store.get_bytes(key, at_most=MAX_BYTES + 1)
    except ObjectNotFoundError:
        return TaskFile()
    except UnusableObjectError as error:
        raise ConfigError(str(error)) from None
    origin = store.uri_of(key)
    return parse(TaskFile, yaml_mapping(content, origin), origin)
