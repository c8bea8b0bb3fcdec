"""The inbox as flows see it: what lies there, which of it is open for a lineage, and what is said of a task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import NamedTuple

from pydantic import field_validator

from deal_core.errors import ConfigError, StoreError
from deal_core.yaml_file import MAX_BYTES, yaml_mapping
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore, UnusableObjectError, check_key
from infra.store.keys import INBOX, task_file_of, task_of
from tasks.adaptation.ingest import reading_the_task
from tasks.inbox.listing import Beside, InboxState, list_arrivals, list_beside, misplaced_keys, split_settled, stamp_of
from tasks.spec import TaskFields, TaskSpec, parse

TestFiles = dict[tuple[str, str], str | None]
"""The file of test rows that a task file names, by the task file's key and ETag."""


class TaskFile(TaskFields):
    """`inbox/<task>/task.yaml`: what is known of a task before its first arrival."""

    test_data: str | None = None
    """Name of the file beside it whose rows are all test rows; it is no arrival of its own."""

    @field_validator("test_data")
    @classmethod
    def _lies_beside(cls, name: str | None) -> str | None:
        try:
            return name if name is None else check_key(name)
        except StoreError:
            raise ValueError("no file in the task's folder has this name; give one such as test.jsonl") from None


@dataclass(frozen=True)
class InboxLook:
    """What lies in the inbox at one moment."""

    arrivals: tuple[ObjectInfo, ...]
    """Oldest first."""
    beside: Mapping[str, Beside]
    """What lies beside the arrivals of a task."""
    misplaced: Mapping[str, str]
    """Keys at which no arrival is looked for, and what is wrong with each."""

    def stamp(self, info: ObjectInfo) -> str:
        """Stamp of what lies beside an arrival."""
        beside = self.beside.get(task_of(info.key))
        return beside.stamp if beside else ""

    def of(self, tasks: Collection[str]) -> list[ObjectInfo]:
        """The arrivals of these tasks, oldest first; no tasks: all arrivals."""
        return [info for info in self.arrivals if not tasks or task_of(info.key) in tasks]

    def open_for(self, state: InboxState, tasks: Collection[str], *, retry_now: bool) -> list[ObjectInfo]:
        """Those of them that a lineage has to handle; `retry_now` as for `InboxState.is_open`."""
        now = datetime.now(UTC)
        return [
            info for info in self.of(tasks) if state.is_open(info, now, beside=self.stamp(info), retry_now=retry_now)
        ]


def look(store: ObjectStore, test_files: TestFiles | None = None) -> InboxLook:
    """List the inbox once, whichever lineages are looked after; what is misplaced is logged once.

    Args:
        store: holds the inbox.
        test_files: what the look before read in task files, so that one that stands as it was is not read again;
            replaced by what this look knows.
    """
    listing = list(store.list(INBOX))
    known = {} if test_files is None else test_files
    task_files = [(info.key, info.etag) for info in listing if info.key == task_file_of(info.key)]
    found = {each: known[each] if each in known else _test_file(store, each[0]) for each in task_files}
    known.clear()
    known.update(found)
    companions = [key for key in found.values() if key]
    misplaced = misplaced_keys(listing, companions)
    for key, problem in misplaced.items():
        store.warn_once(key, f"Skipped {key!r}: it {problem}.")
    return InboxLook(tuple(list_arrivals(listing, companions)), list_beside(listing, companions), misplaced)


class Settled(NamedTuple):
    """A lineage's open arrivals: those that are complete, oldest first, and those that may still be written."""

    complete: list[ObjectInfo]
    growing: list[ObjectInfo]


def settle(
    inbox: InboxLook, state: InboxState, tasks: Collection[str], stamps: dict[str, str], *,
    settle_seconds: float, retry_now: bool,
) -> Settled:
    """What a lineage has to handle of what a look saw.

    Args:
        inbox: the look.
        state: what it has handled.
        tasks: these tasks' files only; none: all.
        stamps: what the look before saw; replaced by what this one sees.
        settle_seconds: how long a file must have been left alone, unless the look before saw the same.
        retry_now: also what failed lately; see `InboxState.is_open`.
    """
    arrivals = inbox.open_for(state, tasks, retry_now=retry_now)
    complete, growing = split_settled(arrivals, stamps, datetime.now(UTC), settle_seconds, inbox.beside)
    stamps.clear()
    stamps.update({info.key: stamp_of(info, inbox.beside.get(task_of(info.key))) for info in arrivals})
    return Settled(complete, growing)


def task_spec(store: ObjectStore, key: str) -> TaskSpec:
    """What the task file and the place of an arrival say of it.

    Raises:
        TaskFieldsError: the task file is damaged, or says what cannot be.
    """
    with reading_the_task():
        fields = _read_task_file(store, task_file_of(key))
        values = {"name": task_of(key), "data": store.uri_of(key), **fields.given()}
        if fields.test_data:
            values["test_data"] = store.uri_of(f"{PurePosixPath(key).parent}/{fields.test_data}")
        return parse(TaskSpec, values, store.uri_of(key))


def _test_file(store: ObjectStore, key: str) -> str | None:
    """The key of the test rows that a task file names."""
    try:
        name = _read_task_file(store, key).test_data
    except ConfigError:
        return None  # said when an arrival of the task is handled
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
