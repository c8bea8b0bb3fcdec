"""The inbox: the arrivals that have landed, and the state of each for a lineage's watch.

A file at inbox/TASK/FILE is an arrival, and so is a folder at inbox/TASK/FOLDER with all its files. The task file
`inbox/TASK/task.yaml` and the file or folder of test rows that it names are companions: they belong to the task's
arrivals.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, field_validator

from deal_core.errors import ConfigError, StoreError
from deal_core.yaml_file import MAX_BYTES, read_yaml, yaml_mapping
from infra.settings import InboxSettings
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore, UnusableObjectError, check_key
from infra.store.keys import INBOX, SUCCESS_FILE, TASK_FILE, task_file_of, task_of
from infra.store.stored import Stored, read_stored, write_stored
from tasks.spec import TaskFields, TaskSpec, parse, reading_the_task

PAUSE = timedelta(seconds=60)
"""Pause before the second try after a failure that may pass; see `growing_pause`."""
MAX_DOUBLINGS = 6
MAX_READER_DEATHS = 2
"""Tries of a file that ends the process that reads it. The first may have been for want of memory."""

Outcome = Literal[
    "promoted", "awaiting approval", "rollout", "rejected", "repeat", "skipped", "refused", "failed", "held", "requeued"
]
TestFiles = dict[tuple[str, str], str | None]
"""The file of test rows that a task file names, by the task file's key and ETag."""


def growing_pause(num_before: int) -> timedelta:
    """Return the pause after a try. It starts at a minute and doubles with every earlier try, up to about an hour."""
    return PAUSE * (1 << min(num_before, MAX_DOUBLINGS))


class Handled(BaseModel, extra="forbid"):
    """The result for one file. It is valid until the file changes or a failed file is tried again."""

    etag: str
    outcome: Outcome
    message: str
    version: str | None = None
    num_tries: int = 1
    beside: str = ""
    """Stamp of the companions when the file was read."""
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
    """The files that a lineage's watch has handled, by key."""

    files: dict[str, Handled] = Field(default_factory=dict)

    def is_open(self, info: ObjectInfo, now: datetime, *, beside: str = "", retry_now: bool) -> bool:
        """Return whether the watch has to handle this content of a file.

        A file whose hold a person ended is open too. A failed file may succeed with other companions, so their stamp
        `beside` counts. With `retry_now`, a failed file is tried again without a pause.
        """
        handled = self.files.get(info.key)
        if handled is None or handled.etag != info.etag or handled.outcome == "requeued":
            return True
        if handled.outcome in ("refused", "failed") and handled.beside != beside:
            return True
        if handled.outcome == "failed" and retry_now:
            return True
        due = handled.due()
        return due is not None and (now >= due or now < handled.at)  # the clock may have gone back

    def record(
        self,
        info: ObjectInfo,
        outcome: Outcome,
        message: str,
        *,
        now: datetime,
        beside: str = "",
        version: str | None = None,
        is_final: bool = False,
        has_killed_reader: bool = False,
        cancelled_run: str | None = None,
    ) -> Handled:
        """Note the result for a file. A failed file that has killed its reader MAX_READER_DEATHS times is refused."""
        before = self.files.get(info.key)
        if before and (before.etag, before.beside, before.outcome) != (info.etag, beside, "failed"):
            before = None
        num_tries = before.num_tries + 1 if before else 1
        num_deaths = (before.num_reader_deaths if before else 0) + has_killed_reader
        if has_killed_reader and num_deaths >= MAX_READER_DEATHS:
            outcome = "refused"
            message = f"{message} It did so in {num_deaths} tries, so it is set aside until it changes."
        handled = Handled(
            etag=info.etag,
            outcome=outcome,
            message=message,
            version=version,
            num_tries=num_tries,
            beside=beside,
            is_final=is_final,
            num_reader_deaths=num_deaths,
            at=now,
            cancelled_run=cancelled_run,
        )
        self.files[info.key] = handled
        return handled

    def requeued(self, info: ObjectInfo) -> Handled | None:
        """Return the note of a file whose hold a person ended, until the file is handled."""
        known = self.files.get(info.key)
        is_this = known is not None and known.outcome == "requeued" and known.etag == info.etag
        return known if is_this else None

    def gone(self, store: ObjectStore) -> list[str]:
        """Return the keys of files that are gone and whose notes have no version. Others name the arrival."""
        return [key for key, note in self.files.items() if note.version is None and not find_landed(store, key)]


def read_state(store: ObjectStore, lineage: str) -> InboxState:
    """Read the state of a lineage's watch. A watch that never ran has an empty state.

    Raises:
        StoreError: The state is damaged, or another release wrote it.
    """
    found = read_stored(
        store,
        keys.watch_key(lineage),
        InboxState,
        what="the state of a watch",
        remedy="Restore it from a backup. Or hold the lineage, then delete it: what was learned is recognised, but "
        "arrivals that were rejected or held are tried again.",
    )
    return found or InboxState()


class KnownStates:
    """A cache of states for readers that look often and change nothing."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[str, InboxState]] = {}

    def read(self, store: ObjectStore, lineage: str) -> InboxState:
        """Do the same as `read_state`, but only if the state has changed."""
        info = store.find(keys.watch_key(lineage))
        if info is None:
            return InboxState()
        known = self._read.get(lineage)
        if known is None or known[0] != info.etag:  # a state written after `find` is read again at the next call
            known = self._read[lineage] = (info.etag, read_state(store, lineage))
        return known[1]


def write_state(store: ObjectStore, lineage: str, state: InboxState) -> None:
    """Write the state of a lineage's watch."""
    write_stored(store, keys.watch_key(lineage), state)


@dataclass(frozen=True, kw_only=True)
class LandedFolder(ObjectInfo):
    """A folder that landed as one arrival. Its ETag is a digest of its files' keys and ETags."""

    files: tuple[ObjectInfo, ...]
    """The files with its rows, in the order of their keys."""
    is_marked: bool
    """Whether a file `_SUCCESS` says that the folder is complete."""

    @classmethod
    def of(cls, key: str, files: Sequence[ObjectInfo], *, is_marked: bool) -> LandedFolder:
        """Return the folder of these files."""
        lines = "".join(f"{info.key}\n{info.etag}\n" for info in files)
        return cls(
            key=key,
            size=sum(info.size for info in files),
            etag=hashlib.sha256(lines.encode()).hexdigest()[:32],
            modified=max(info.modified for info in files),
            landed=max(info.landed or info.modified for info in files),
            files=tuple(files),
            is_marked=is_marked,
        )


def waits_for_quiet(info: ObjectInfo) -> bool:
    """Return whether an arrival is complete only when nothing has changed for some time: a folder without a mark."""
    return isinstance(info, LandedFolder) and not info.is_marked


def files_of(info: ObjectInfo) -> tuple[ObjectInfo, ...]:
    """Return the files with an arrival's rows."""
    return info.files if isinstance(info, LandedFolder) else (info,)


def list_arrivals(listing: Iterable[ObjectInfo], companions: Iterable[str] = ()) -> list[ObjectInfo]:
    """Return the arrivals in a listing of the inbox, oldest first. `companions` are the keys of the test rows."""
    skipped = {keys.top_of(key) for key in companions}
    arrivals: list[ObjectInfo] = []
    folders: dict[str, list[ObjectInfo]] = defaultdict(list)
    marked = set()
    for info in listing:
        arrival = keys.arrival_of(info.key)
        if keys.file_name(info.key) == SUCCESS_FILE:
            marked.add(info.key.removesuffix(f"/{SUCCESS_FILE}"))
        if arrival is None or arrival in skipped:
            continue
        if arrival == info.key:
            arrivals.append(info)
        else:
            folders[arrival].append(info)
    arrivals += [LandedFolder.of(key, files, is_marked=key in marked) for key, files in folders.items()]
    return sorted(arrivals, key=lambda info: (info.modified, info.key))


def find_landed(store: ObjectStore, key: str) -> ObjectInfo | None:
    """Return the file or the folder that has landed under a key; None: nothing has."""
    return store.find(key) or next(iter(list_arrivals(store.list(key))), None)


def _is_beside(key: str, companions: Collection[str]) -> bool:
    """Whether a file is a companion or lies in a folder that is one."""
    return any(key == companion or key.startswith(f"{companion}/") for companion in companions)


def _misplacement(key: str, companions: Collection[str]) -> str | None:
    """Why a key is in a wrong folder, and the remedy; None: it is not. Hidden files and task files do not count."""
    folder, *names = key.split("/")
    if names[-1] == TASK_FILE or any(name.startswith(".") for name in names) or _is_beside(key, companions):
        return None
    if len(names) == 1:
        return f"is not in a task's folder; move it to {folder}/TASK/{names[0]}"
    if len(names) > 2 and keys.top_of(key) in map(keys.top_of, companions):
        return "is in a folder with the task's test rows, which is no arrival; move it to a folder of its own"
    return None


class Beside(NamedTuple):
    """The companions of a task: a stamp that changes with their contents, and the time of the last change."""

    stamp: str
    modified: datetime


def _list_beside(listing: Iterable[ObjectInfo], companions: Collection[str]) -> dict[str, Beside]:
    """The companions of every task with a task file. `companions` are the keys of the test rows."""
    found: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in sorted(listing, key=lambda info: info.key):
        if _is_beside(info.key, companions) or info.key == task_file_of(info.key):
            found[task_of(info.key)].append(info)
    return {
        task: Beside(" ".join(info.etag for info in infos), max(info.modified for info in infos))
        for task, infos in found.items()
    }


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

    arrivals: tuple[ObjectInfo, ...]
    """Oldest first."""
    beside: Mapping[str, Beside]
    """Companions by task."""
    misplaced: Mapping[str, str]
    """Keys in a wrong folder, with the problem of each."""

    def stamp(self, info: ObjectInfo) -> str:
        """Return the stamp of an arrival's companions."""
        beside = self.beside.get(task_of(info.key))
        return beside.stamp if beside else ""

    def of(self, tasks: Collection[str]) -> list[ObjectInfo]:
        """Return the arrivals of these tasks, oldest first; without tasks: all arrivals."""
        return [info for info in self.arrivals if not tasks or task_of(info.key) in tasks]

    def open_for(self, state: InboxState, tasks: Collection[str], *, retry_now: bool) -> list[ObjectInfo]:
        """Return the arrivals of these tasks that a lineage has to handle. For `retry_now` see `InboxState.is_open`."""
        now = datetime.now(UTC)
        return [
            info for info in self.of(tasks) if state.is_open(info, now, beside=self.stamp(info), retry_now=retry_now)
        ]


def look(store: ObjectStore, test_files: TestFiles | None = None) -> InboxLook:
    """List the inbox once for all lineages. Each misplaced file is logged once.

    `test_files` is a cache of the task files that the previous look read. The call updates the cache.
    """
    listing = list(store.list(INBOX))
    known = {} if test_files is None else test_files
    found: TestFiles = {}
    for key, etag in [(info.key, info.etag) for info in listing if info.key == task_file_of(info.key)]:
        try:
            found[key, etag] = known[key, etag] if (key, etag) in known else _test_file(store, key)
        except StoreError as error:  # its test rows must not become an arrival
            store.warn_once(key, f"Task '{task_of(key)}' learns nothing, as its task file cannot be read: {error}")
            listing = [info for info in listing if task_of(info.key) != task_of(key)]
    known.clear()
    known.update(found)
    companions = {key for key in found.values() if key}
    problems = ((info.key, _misplacement(info.key, companions)) for info in listing)
    misplaced = {key: problem for key, problem in problems if problem is not None}
    for key, problem in misplaced.items():
        store.warn_once(key, f"Skipped {key!r}: it {problem}.")
    return InboxLook(tuple(list_arrivals(listing, companions)), _list_beside(listing, companions), misplaced)


class Settled(NamedTuple):
    """A lineage's open arrivals: complete ones, oldest first, and those that may still be written."""

    complete: list[ObjectInfo]
    growing: list[ObjectInfo]


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
    found, now, seen = Settled([], []), datetime.now(UTC), dict(stamps)
    quiet_seconds = InboxSettings().inbox_settle_seconds
    stamps.clear()
    for info in inbox.open_for(state, tasks, retry_now=retry_now):
        beside = inbox.beside.get(task_of(info.key))
        waits = waits_for_quiet(info)
        changed = (info.landed if waits else None) or info.modified
        changed = max(changed, beside.modified) if beside else changed
        stamps[info.key] = f"{info.etag} {inbox.stamp(info)}".strip()
        is_old = now - changed.astimezone(UTC) >= timedelta(seconds=quiet_seconds if waits else settle_seconds)
        is_same = not waits and seen.get(info.key) == stamps[info.key]
        (found.complete if is_old or is_same else found.growing).append(info)
    return found


class HeldArrival(BaseModel, frozen=True):
    """An arrival that waits for `deal version requeue`, because its run was cancelled; see `tasks.arrival_runs`."""

    key: str
    why: str

    def remedy(self, lineage: str) -> str:
        """Return the command that lets the arrival go on."""
        return f"deal data release {shlex.quote(self.key)} --lineage {lineage}"


def held_arrivals(inbox: InboxLook, state: InboxState, tasks: Collection[str] = ()) -> tuple[HeldArrival, ...]:
    """Return the arrivals of these tasks that are held, oldest first; without tasks: all of them."""
    return tuple(
        HeldArrival(key=info.key, why=known.message)
        for info in inbox.of(tasks)
        if (known := state.files.get(info.key)) and known.outcome == "held" and known.etag == info.etag
    )


def find_held(store: ObjectStore, lineage: str) -> tuple[HeldArrival, ...]:
    """Return all held arrivals of a lineage, oldest first."""
    state = read_state(store, lineage)
    if not any(known.outcome == "held" for known in state.files.values()):
        return ()
    return held_arrivals(look(store), state)


def task_spec(store: ObjectStore, *keys: str) -> TaskSpec:
    """Make the spec of an arrival from the keys of its files and from its task file. The files are of one task.

    Raises:
        TaskFieldsError: The task file is damaged or has a setting that is not valid.
    """
    with reading_the_task():
        first, several = keys[0], tuple(map(store.uri_of, keys))
        fields = _read_task_file(store, task_file_of(first))
        tests = fields.test_data and store.uri_of(f"{PurePosixPath(first).parent}/{fields.test_data}")
        return _make_spec(fields, task_of(first), several if len(several) > 1 else several[0], tests, several[0])


def _make_spec(
    fields: TaskFile, name: str, data: str | tuple[str, ...], test_data: str | None, origin: str
) -> TaskSpec:
    """The spec of an arrival, from a task file and the addresses of its rows."""
    tests = {"test_data": test_data} if test_data else {}
    return parse(TaskSpec, {"name": name, "data": data, **fields.given(), **tests}, origin)


def task_file_beside(file: str) -> Path | None:
    """Return the task file in the folder of a file on this machine; None: there is none."""
    path = Path(file).absolute().parent / TASK_FILE
    return path if "://" not in file and path.is_file() else None


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


def _test_file(store: ObjectStore, key: str) -> str | None:
    """The key of the test rows that a task file names."""
    try:
        name = _read_task_file(store, key).test_data
    except ConfigError:
        return None  # `task_spec` reports the error for every arrival of the task
    return f"{PurePosixPath(key).parent}/{name}" if name else None


def _read_task_file(store: ObjectStore, key: str) -> TaskFile:
    try:
        content = store.get_bytes(key, at_most=MAX_BYTES + 1)
    except ObjectNotFoundError:
        return TaskFile()
    except UnusableObjectError as error:
        raise ConfigError(str(error)) from None
    origin = store.uri_of(key)
    return parse(TaskFile, yaml_mapping(content, origin), origin)
