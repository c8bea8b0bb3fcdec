"""Arrivals of the inbox: which are open for a lineage, and how one is handled."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from deal_core.errors import ConfigError, DataValidationError
from flows.adapt import adapt_held
from flows.lock import hold_lineage
from flows.results import AdaptResult
from flows.screens import in_one_line
from flows.spec import LineageSpec, TaskFields, TaskSpec, parse, yaml_mapping
from infra.object_store import ObjectInfo, ObjectStore
from tasks.inbox import (
    INBOX,
    TASK_FILE,
    Beside,
    Handled,
    InboxState,
    Outcome,
    list_arrivals,
    list_beside,
    read_state,
    split_settled,
    stamp_of,
    task_of,
    write_state,
)
from tasks.ingest import reading_the_task
from tasks.progress import Interrupted, is_stopped, reporter

logger = logging.getLogger(__name__)


class TaskFile(TaskFields):
    """`inbox/<task>/task.yaml`: what is known of a task before its first arrival."""

    test_data: str | None = None
    """Name of the file beside it whose rows are all test rows; it is no arrival of its own."""


@dataclass(frozen=True)
class InboxLook:
    """What lies in the inbox at one moment."""

    arrivals: tuple[ObjectInfo, ...]
    """Oldest first."""
    beside: Mapping[str, Beside]
    """What lies beside the arrivals of a task."""

    def stamp(self, info: ObjectInfo) -> str:
        """Stamp of what lies beside an arrival."""
        beside = self.beside.get(task_of(info.key))
        return beside.stamp if beside else ""

    def open_for(self, state: InboxState, *, retry_now: bool) -> list[ObjectInfo]:
        """Arrivals that a lineage has to handle, oldest first; `retry_now` as for `InboxState.is_open`."""
        now = datetime.now(UTC)
        return [
            info for info in self.arrivals if state.is_open(info, now, beside=self.stamp(info), retry_now=retry_now)
        ]


def look(store: ObjectStore, tasks: Collection[str] = ()) -> InboxLook:
    """List the inbox once; of these tasks alone, if any are given."""
    listing = list(store.list(INBOX))
    companions = tuple(_companions(store, listing))
    landed = [info for info in list_arrivals(listing, companions) if not tasks or task_of(info.key) in tasks]
    return InboxLook(arrivals=tuple(landed), beside=list_beside(listing, companions))


class Settled(NamedTuple):
    """A lineage's open arrivals: those that are complete, oldest first, and those that may still be written."""

    inbox: InboxLook
    complete: list[ObjectInfo]
    growing: list[ObjectInfo]


def look_for(
    store: ObjectStore, lineage: str, tasks: Collection[str], stamps: dict[str, str], *,
    settle_seconds: float, retry_now: bool,
) -> Settled:
    """Look at the inbox for a lineage.

    Args:
        store: holds the inbox.
        lineage: its name.
        tasks: look at these tasks' files only; none: at all.
        stamps: what the look before saw; replaced by what this one sees.
        settle_seconds: how long a file must have been left alone, unless the look before saw the same.
        retry_now: also what failed lately; see `InboxState.is_open`.
    """
    inbox = look(store, tasks)
    arrivals = inbox.open_for(read_state(store, lineage), retry_now=retry_now)
    complete, growing = split_settled(arrivals, stamps, datetime.now(UTC), settle_seconds, inbox.beside)
    stamps.clear()
    stamps.update({info.key: stamp_of(info, inbox.beside.get(task_of(info.key))) for info in arrivals})
    return Settled(inbox, complete, growing)


class Seen(BaseModel):
    """A file and what became of it."""

    model_config = ConfigDict(frozen=True)

    key: str
    outcome: str
    message: str
    version: str | None


@dataclass
class Taken:
    """What a run has handled so far, and what its last look at the inbox left."""

    files: list[Seen] = field(default_factory=list)
    runs: list[AdaptResult] = field(default_factory=list)
    num_growing: int = 0
    """Open files that may still be written."""
    _stamps: dict[str, str] = field(default_factory=dict)

    async def take(
        self, store: ObjectStore, spec: LineageSpec, tasks: Collection[str], *,
        settle_seconds: float, retry_now: bool, wait: bool,
    ) -> int:
        """Look once and adapt to what is open and complete, oldest first; return how many files that were.

        Args:
            store: holds the inbox.
            spec: the lineage and how it learns.
            tasks: look at these tasks' files only; none: at all.
            settle_seconds: how long a file must have been left alone, unless the look before saw the same.
            retry_now: also what failed lately; see `InboxState.is_open`.
            wait: for the run that holds the lineage, if one does.

        Raises:
            LineageBusyError: with `wait` off, another run holds the lineage.
        """
        inbox, settled, growing = look_for(
            store, spec.lineage, tasks, self._stamps, settle_seconds=settle_seconds, retry_now=retry_now
        )
        self.num_growing = len(growing)
        if settled:
            async with hold_lineage(spec.lineage, wait=wait):
                for info in settled:
                    if is_stopped():
                        break
                    await self._handle(store, spec, info, inbox.stamp(info), retry_now)
        return len(settled)

    async def _handle(
        self, store: ObjectStore, spec: LineageSpec, info: ObjectInfo, beside: str, retry_now: bool
    ) -> None:
        state = read_state(store, spec.lineage)
        if not state.is_open(info, datetime.now(UTC), beside=beside, retry_now=retry_now):
            return  # done by the run that held the lineage meanwhile
        handled, run = await _adapt_to(store, spec, state, info, beside)
        write_state(store, spec.lineage, state)
        self.files.append(
            Seen(key=info.key, outcome=handled.outcome, message=handled.message, version=handled.version)
        )
        self.runs += [run] if run else []


async def _adapt_to(
    store: ObjectStore, spec: LineageSpec, state: InboxState, info: ObjectInfo, beside: str
) -> tuple[Handled, AdaptResult | None]:
    """Adapt to one file; one that cannot be used is noted, so that it is reported once. Other errors may pass."""
    reporter().said(f"{info.key.removeprefix(INBOX + '/')} has landed")
    run: AdaptResult | None = None
    version: str | None = None
    outcome: Outcome
    try:
        run = await adapt_held(spec.with_task(_task_spec(store, info.key)))
        outcome, message, version = run.status, run.message, run.version
    except DataValidationError as error:
        outcome, message = "refused", in_one_line(error)
        reporter().said(f"Refused: {message}")
    except Interrupted:
        raise
    except Exception as error:
        logger.exception("The run for %s failed", info.key)
        outcome, message = "failed", in_one_line(error)
        reporter().said(f"Failed: {message}")
    return state.record(info, outcome, message, now=datetime.now(UTC), beside=beside, version=version), run


def _task_spec(store: ObjectStore, key: str) -> TaskSpec:
    folder = PurePosixPath(key).parent
    with reading_the_task():
        fields = _read_task_file(store, str(folder / TASK_FILE))
        values = {"name": task_of(key), "data": store.uri_of(key), **fields.given()}
        if fields.test_data:
            values["test_data"] = store.uri_of(str(folder / fields.test_data))
        return parse(TaskSpec, values, store.uri_of(key))


def _companions(store: ObjectStore, listing: Iterable[ObjectInfo]) -> Iterable[str]:
    """Keys of the test files that task files name."""
    for info in listing:
        path = PurePosixPath(info.key)
        if path.name == TASK_FILE and len(path.parts) == 3:
            try:
                test_data = _read_task_file(store, info.key).test_data
            except ConfigError:
                continue  # said when an arrival of the task is handled
            if test_data:
                yield str(path.parent / test_data)


def _read_task_file(store: ObjectStore, key: str) -> TaskFile:
    if not store.exists(key):
        return TaskFile()
    origin = store.uri_of(key)
    return parse(TaskFile, yaml_mapping(store.get_bytes(key), origin), origin)
