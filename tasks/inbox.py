"""The inbox: the arrivals that have landed. `tasks.arrival_queue` says what becomes of each.

A file at inbox/TASK/FILE is an arrival, and so is a folder at inbox/TASK/FOLDER with all its files. The task file
`inbox/TASK/task.yaml` and the file or folder of test rows that it names are companions: they belong to the task's
arrivals.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from pydantic import field_validator

from deal_core.errors import ConfigError, StoreError
from deal_core.yaml_file import MAX_BYTES, read_yaml, yaml_mapping
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore, UnusableObjectError, check_key
from infra.store.keys import INBOX, SUCCESS_FILE, TASK_FILE, task_file_of, task_of
from tasks.spec import TaskFields, TaskSpec, parse, reading_the_task

_test_data: dict[tuple[str, str, str], str | None] = {}
"""What task files name as test rows, by the store's address, the task file's key and its ETag."""


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

    @cached_property
    def written(self) -> str:
        """A digest of its files' keys, sizes and times, all of which a copy that keeps times has too."""
        lines = "".join(f"{info.key}\n{info.size}\n{info.modified.isoformat()}\n" for info in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()[:32]

    @cached_property
    def content(self) -> str | None:
        """A digest of its files' contents. None: a copy keeps its ETag, so the ETag says it, or a file has changed."""
        read = [info.read_sha256() if info.read_sha256 else None for info in self.files]
        digests = [sha256 for sha256 in read if sha256 is not None]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:32] if len(digests) == len(read) else None

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
    unread: frozenset[str] = frozenset()
    """Tasks whose task file could not be read now, so their arrivals are not among these."""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When it began."""

    def of(self, tasks: Collection[str]) -> list[Arrival]:
        """Return the arrivals of these tasks, oldest first; without tasks: all arrivals."""
        return [arrival for arrival in self.arrivals if not tasks or task_of(arrival.key) in tasks]


def look(store: ObjectStore) -> InboxLook:
    """List the inbox once for all lineages. Each misplaced file is logged once."""
    now, listing = datetime.now(UTC), list(store.list(INBOX))
    test_data, unread = set[str](), set[str]()
    for info in [info for info in listing if info.key == task_file_of(info.key)]:
        place, task = (store.uri, info.key, info.etag), task_of(info.key)
        try:
            name = _test_data[place] if place in _test_data else _read_task_file(store, info.key).test_data
        except ConfigError:
            name = None  # `task_spec` reports the error for every arrival of the task
        except StoreError as error:  # its test rows must not become an arrival
            store.warn_once(info.key, f"Task '{task}' learns nothing, as its task file cannot be read: {error}")
            unread.add(task)
            continue
        _test_data[place] = name
        test_data |= {f"{keys.inbox_folder(task)}/{name}"} if name else set()
    listing = [info for info in listing if task_of(info.key) not in unread]
    problems = ((info.key, _misplacement(info.key, test_data)) for info in listing)
    misplaced = {key: problem for key, problem in problems if problem is not None}
    for key, problem in misplaced.items():
        store.warn_once(key, f"Skipped {key!r}: it {problem}.")
    return InboxLook(tuple(list_arrivals(listing, test_data)), misplaced, frozenset(unread), now)


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
