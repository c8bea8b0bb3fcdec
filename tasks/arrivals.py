"""The arrivals of a lineage, in the store: looks at the inbox, the ends of tries, and what is held.

`tasks.arrival_queue` decides; the functions here read the inbox, count rows, and write the lineage's state.
"""

from __future__ import annotations

import math
import shlex
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from deal_core.data.reading.readers import count_rows
from deal_core.errors import ConfigError, DataValidationError, StoreError
from deal_core.safe_text import listed
from infra.lineage_state import (
    Batch,
    EndedArrival,
    LineageState,
    note_ended,
    read_ended,
    read_state,
    rewrite_ended,
    update,
)
from infra.settings import InboxSettings
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.keys import INBOX, task_of
from infra.versions import Versions
from tasks.arrival_queue import Plan, Result, claim, ends_of, finish, is_of, judged, let_go, plan, sense
from tasks.data_files import local_files
from tasks.inbox import InboxLook
from tasks.lineage.held import held_by_check, name_of, release_checked
from tasks.lineage.settings import WatchedLineage
from tasks.progress import reporter

COUNTED_TOGETHER = 100
"""Most arrivals whose rows are counted before the numbers are noted."""
COUNTED_BYTES = 1 << 28
"""Bytes after which no further arrival is counted together with others: those of a bucket are copied here."""


def sense_inbox(
    store: ObjectStore, lineage: WatchedLineage, inbox: InboxLook, settle_seconds: float, *, is_reader: bool = False
) -> LineageState:
    """Put a look at the inbox into the state of a lineage, and return the state. Rows that decide are counted.

    A reader, such as `deal status`, writes nothing but what it has counted, if it may write at all: for the others no
    arrival is complete because a reader calls it so.
    """
    name, ended, num_rows = lineage.lineage, dict[str, EndedArrival](), dict[str, int]()

    def change(state: LineageState, settle_seconds: float = settle_seconds) -> LineageState:
        nonlocal ended
        # After the state was read: an end is noted before its arrival leaves the state, so none is missed in between.
        ended = read_ended(store, name)
        return sense(
            state,
            ended,
            inbox,
            datetime.now(UTC),
            tasks=lineage.tasks,
            settle_seconds=settle_seconds,
            quiet_seconds=InboxSettings().inbox_settle_seconds,
            num_rows=num_rows,
        )

    state = change(read_state(store, name)) if is_reader else update(store, name, change)
    if not is_reader:
        _recognise(store, name, inbox, ended)
    if not lineage.retrain.may_wait:
        return state
    sizes = {arrival.key: sum(file.size for file in arrival.files) for arrival in inbox.arrivals}
    waiting = (key for key, note in state.arrivals.items() if note.state == "waiting" and note.num_rows is None)
    uncounted = deque(key for key in waiting if key in sizes)
    while uncounted:
        group, num_bytes = list[str](), 0
        while uncounted and len(group) < COUNTED_TOGETHER and num_bytes < COUNTED_BYTES:
            group.append(uncounted.popleft())
            num_bytes += sizes[group[-1]]
        num_rows |= _count(store, group)
        if is_reader:
            with suppress(StoreError):
                update(store, name, partial(change, settle_seconds=math.inf))
        state = change(state) if is_reader else update(store, name, change)
    return state


def _recognise(store: ObjectStore, lineage: str, inbox: InboxLook, ended: Mapping[str, EndedArrival]) -> None:
    """Note the present ETags of arrivals that were copied after they had ended: no copy is read twice."""
    etags = {
        arrival.key: (end.etag, arrival.etag)
        for arrival in inbox.arrivals
        if (end := ended.get(arrival.key)) and end.etag != arrival.etag and is_of(end, arrival)
    }

    def rewrite(key: str, end: EndedArrival) -> EndedArrival:
        before, now = etags.get(key, ("", ""))
        return end.model_copy(update={"etag": now}) if end.etag == before else end

    if etags:
        rewrite_ended(store, lineage, rewrite)


def _count(store: ObjectStore, keys: Sequence[str]) -> dict[str, int]:
    """Return the numbers of rows of arrivals; 0: it cannot be read, or has no row. One that is gone is left out."""
    counts: dict[str, int] = {}
    paths: dict[Path, str] = {}
    with ExitStack() as stack:
        for key in keys:
            with suppress(ObjectNotFoundError):
                try:
                    files = stack.enter_context(local_files(store, store.uri_of(key)))
                    paths |= {file.path: key for file in files}
                except DataValidationError:
                    pass
                counts[key] = 0
        unreadable = set()
        for key, number in zip(paths.values(), count_rows([*paths]), strict=True):
            counts[key] += number or 0
            unreadable |= {key} if number is None else set()
    return {key: 0 if key in unreadable else number for key, number in counts.items()}


def plan_now(
    store: ObjectStore, lineage: WatchedLineage, state: LineageState, failed_before: datetime | None = None
) -> Plan:
    """Decide what a lineage has to learn now; see `plan`."""
    hours = partial(_spent_hours, store, lineage)
    return plan(state, lineage.retrain, datetime.now(UTC), hours, tasks=lineage.tasks, failed_before=failed_before)


def claim_next(
    store: ObjectStore,
    lineage: WatchedLineage,
    failed_before: datetime | None = None,
    *,
    is_alone: bool = False,
    run: str | None = None,
) -> LineageState:
    """Claim what is due next, and return the state of the lineage; see `claim`."""
    change = partial(
        claim,
        policy=lineage.retrain,
        now=datetime.now(UTC),
        spent_hours=partial(_spent_hours, store, lineage),
        new_id=uuid.uuid4().hex[:12],
        tasks=lineage.tasks,
        failed_before=failed_before,
        is_alone=is_alone,
        run=run,
    )
    return update(store, lineage.lineage, change)


def _spent_hours(store: ObjectStore, lineage: WatchedLineage, now: datetime) -> float:
    """The hours of the lineage's trainings that have ended in the month of a time."""
    first, following = lineage.retrain.month_of(now)
    versions = Versions(store).all(lineage.lineage)
    return sum(version.train_seconds for version in versions if first <= version.created < following) / 3600


def end_try(store: ObjectStore, lineage: str, batch: Batch, result: Result, inbox: InboxLook) -> Result:
    """Write how a try of a batch has ended: first into the notes about ended arrivals, then into the state.

    Return the result in view of the tries before.
    """
    now, arrivals = datetime.now(UTC), {arrival.key: arrival for arrival in inbox.arrivals}
    result = judged(batch, result)
    if ends := ends_of(read_state(store, lineage), batch, result, now, arrivals):
        gone = {key for key in read_ended(store, lineage) if key not in arrivals and task_of(key) not in inbox.unread}
        note_ended(store, lineage, ends, frozenset(gone))
    update(store, lineage, lambda state: finish(state, batch.id, result, now, arrivals))
    return result


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


def held_arrivals(state: LineageState) -> tuple[HeldArrival, ...]:
    """Return all held arrivals of a lineage: those of the inbox, then files from elsewhere, each oldest first."""
    held = sorted((note.modified, key, note.why) for key, note in state.arrivals.items() if note.state == "held")
    elsewhere = [
        HeldArrival(key=name, task=arrival.task, why=arrival.why)
        for arrival in held_by_check(state)
        for name in arrival.names
        if not name.startswith(f"{INBOX}/")
    ]
    return (*(HeldArrival(key=key, task=task_of(key), why=why) for _, key, why in held), *elsewhere)


def release(store: ObjectStore, lineage: str, named: Sequence[str] = (), *, checked: bool = True) -> tuple[str, ...]:
    """Let held arrivals go on, all of them if none is named; return what they are called.

    The next look learns those of the inbox. Another file is learned by the command that was held. Without `checked`,
    arrivals stay held whose labels disagree with the champion.

    Raises:
        ConfigError: A named arrival is not held.
    """
    released: list[str] = []

    def change(state: LineageState) -> LineageState:
        disagreeing = {name: arrival for arrival in held_by_check(state) for name in arrival.names}
        held = [arrival.key for arrival in held_arrivals(state) if checked or arrival.key not in disagreeing]
        wanted = [name_of(store, name) for name in named] or held
        for name in wanted:
            if name not in held:
                which = f"held are: {', '.join(held)}" if held else "none is held"
                raise ConfigError(f"{name} is not held for lineage '{lineage}'; {which}.", code="not-held")
        # the files of one arrival go on together
        arrivals = [disagreeing[name] for name in wanted if name in disagreeing]
        wanted = list(dict.fromkeys([*wanted, *(name for arrival in arrivals for name in arrival.names)]))
        released[:] = wanted
        return let_go(release_checked(state, arrivals), wanted)

    update(store, lineage, change)
    if keys := [name for name in released if name.startswith(f"{INBOX}/")]:
        reporter().said(f"{listed(keys)}: held no longer; the next look of a watch learns this.")
    return tuple(released)
