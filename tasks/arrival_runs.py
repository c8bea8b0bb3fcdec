"""The runs that a Prefect server starts for arrivals: an event announces each arrival, and a cancelled run holds it.

`release` lets go on what is held, for whatever reason.

A person cancels a run of the deployment `adapt` on Prefect's page, by its command or by its API. All arrivals that the
run had still to learn are then held until `deal data release`. The server's states are read before anything else is
learned or announced, so the hold does not depend on the run's process, which may have been killed.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count, takewhile
from typing import NamedTuple

from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events import emit_event
from prefect.settings import get_current_settings
from pydantic import BaseModel, ValidationError

from deal_core.errors import ConfigError
from deal_core.safe_text import listed
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.keys import INBOX, landed_key, task_of
from tasks.inbox import Arrival, HeldArrival, growing_pause, look, read_state, write_state
from tasks.lineage.held import held_by_check, let_go, name_of
from tasks.progress import patient, reporter

ARRIVAL_LANDED = "deal.arrival.landed"
"""The event. Its resource is `deal.lineage.NAME`, its payload has lineage, task, uri and etag."""
LANDED = "deal-arrival-landed"
"""The automation of prefect.yaml that starts a run for the event."""
DEPLOYMENT = "adapt"
"""The deployment of prefect.yaml whose runs learn what lands."""
CANCELLATION = (StateType.CANCELLING, StateType.CANCELLED)
"""The states of a run that a person cancels, in this order."""
_PAGE = 100
"""Runs asked for at once; a server of Prefect gives 200 at most."""


class Announcement(BaseModel, extra="forbid"):
    """The last announcement of an arrival, at `landed/LINEAGE/DIGEST.json` (digest of key, content and companions).

    An arrival that a run began before its announcement counts as announced.
    """

    key: str
    etag: str
    number: int
    """Number of earlier announcements."""
    at: datetime


def announce(
    store: ObjectStore, lineage: str, arrival: Arrival, released: datetime | None = None, *, number: int = 0
) -> None:
    """Announce an arrival to the server, then note the announcement. A repeat after a crash counts once.

    `released` is when a person ended a hold of the arrival. The server ignores an event that it has had half an hour
    before; an announcement after the hold is another event than one before. `number` counts earlier announcements.
    """
    uri, content = store.uri_of(arrival.key), f"{arrival.etag} {arrival.stamp}".strip()
    after = f" after {released.isoformat()}" if released else ""
    emit_event(
        event=ARRIVAL_LANDED,
        resource={"prefect.resource.id": f"deal.lineage.{lineage}", "prefect.resource.name": lineage},
        payload={"lineage": lineage, "task": task_of(arrival.key), "uri": uri, "etag": arrival.etag},
        id=uuid.uuid5(uuid.NAMESPACE_URL, f"{lineage} {uri}@{content} {number}{after}"),  # a repeat has the same id
        occurred=datetime.now(UTC),
    )
    note_announced(store, lineage, arrival, number)


def announce_again(
    store: ObjectStore,
    lineage: str,
    arrival: Arrival,
    last: Announcement,
    now: datetime,
    released: datetime | None = None,
) -> bool:
    """Announce an open arrival without a run once more, if the pause since its last announcement is over.

    The pauses grow, because the arrival's run may be waiting for a worker. Return whether the pause was over.
    """
    if timedelta(0) <= now - last.at < growing_pause(last.number):  # a clock may have gone back
        return False
    announce(store, lineage, arrival, released, number=last.number + 1)
    return True


def note_announced(store: ObjectStore, lineage: str, arrival: Arrival, number: int = 0) -> None:
    """Note an announcement.

    Also note an arrival that a run begins to learn without one: if the run is lost, a server announces the arrival.
    """
    note = Announcement(key=arrival.key, etag=arrival.etag, number=number, at=datetime.now(UTC))
    store.put_bytes(_announcement_key(lineage, arrival), note.model_dump_json().encode())


def read_announcements(store: ObjectStore, lineage: str, arrivals: Sequence[Arrival]) -> dict[str, Announcement]:
    """Return the last announcement of each arrival by its key. A damaged note counts as none."""
    announced = {}
    for arrival in arrivals:
        with suppress(ObjectNotFoundError, ValidationError):
            note = store.get_bytes(_announcement_key(lineage, arrival))
            announced[arrival.key] = Announcement.model_validate_json(note)
    return announced


def drop_announcement(store: ObjectStore, lineage: str, arrival: Arrival) -> None:
    """Delete the note of an announcement after its arrival was handled."""
    store.delete(_announcement_key(lineage, arrival))


def _announcement_key(lineage: str, arrival: Arrival) -> str:
    digest = hashlib.sha256(f"{arrival.key}\n{arrival.etag}\n{arrival.stamp}".encode()).hexdigest()
    return landed_key(lineage, digest)


def learning_deployment() -> filters.DeploymentFilter:
    """Return the filter for this project's deployment whose runs learn what lands."""
    return filters.DeploymentFilter(
        name=filters.DeploymentFilterName(any_=[DEPLOYMENT]), tags=filters.DeploymentFilterTags(all_=["deal"])
    )


class CancelledRun(NamedTuple):
    """A run that a person cancelled."""

    id: str
    name: str
    at: datetime
    """When it was asked to end. Its process may have ended much later."""


async def hold_cancelled(
    store: ObjectStore, lineage: str, arrivals: Sequence[Arrival], announced: Mapping[str, Announcement]
) -> tuple[str, ...]:
    """Hold those of a lineage's open arrivals whose run was cancelled; return their keys.

    A cancelled run holds an arrival if it was cancelled after the arrival was announced, or after a run without an
    announcement began to learn it. An arrival that no run has seen is not held: the file's own time says nothing, since
    a copy may keep the time of its original. A later `deal data release` ends the hold. `announced` has the last
    announcement by the arrival's key.
    """
    if not arrivals or not get_current_settings().api.url:
        return ()
    before = read_state(store, lineage)
    seen = {arrival.key: before.noted_as(arrival, "requeued") or announced.get(arrival.key) for arrival in arrivals}
    since = {key: note.at for key, note in seen.items() if note is not None}
    if not since:
        return ()
    runs = await cancelled_runs(lineage, min(since.values()))
    state = read_state(store, lineage)  # another process may have recorded a result meanwhile
    held = []
    for arrival in [arrival for arrival in arrivals if arrival.key in since]:
        released = before.noted_as(arrival, "requeued")
        over = released.cancelled_run if released else None  # by the server's clock, it may look newer than the release
        run = next((run for run in runs if run.at >= since[arrival.key] and run.id != over), None)
        if run is not None and state.files.get(arrival.key) == before.files.get(arrival.key):
            message = f"Its run {run.name} was cancelled on {run.at.astimezone(UTC):%Y-%m-%d %H:%M} UTC."
            state.record(arrival, "held", message, now=datetime.now(UTC), cancelled_run=run.id)
            held.append(arrival)
    if held:
        write_state(store, lineage, state)
    for arrival in held:
        drop_announcement(store, lineage, arrival)
        reporter().said(
            HeldArrival(key=arrival.key, task=task_of(arrival.key), why=state.files[arrival.key].message).line(lineage)
        )
    return tuple(arrival.key for arrival in held)


@patient
async def cancelled_runs(lineage: str, since: datetime) -> list[CancelledRun]:
    """Return the runs that learn what lands for a lineage and were cancelled since then, newest first.

    A run that is being cancelled counts too: its process may be gone, and then it stays in this state.
    """
    async with get_client() as client:
        runs: list[FlowRun] = []
        for offset in count(0, _PAGE):
            page = await client.read_flow_runs(
                flow_run_filter=filters.FlowRunFilter(
                    state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=list(CANCELLATION)))
                ),
                deployment_filter=learning_deployment(),
                sort=FlowRunSort.EXPECTED_START_TIME_DESC,
                limit=_PAGE,
                offset=offset,
            )
            runs += page
            if len(page) < _PAGE:
                break
        cancelled = []
        for run in runs:
            if run.parameters.get("lineage") != lineage or run.state is None or run.state.timestamp < since:
                continue
            states = await client.read_flow_run_states(run.id)
            newest_first = sorted(states, key=lambda state: state.timestamp, reverse=True)
            # The last cancellation began with its first state; none: somebody has started the run again since.
            cancellation = list(takewhile(lambda state: state.type in CANCELLATION, newest_first))
            if cancellation and cancellation[-1].timestamp >= since:
                cancelled.append(CancelledRun(str(run.id), run.name, cancellation[-1].timestamp))
    return sorted(cancelled, key=lambda run: run.at, reverse=True)


def release(store: ObjectStore, lineage: str, named: Sequence[str] = (), *, checked: bool = True) -> tuple[str, ...]:
    """Let held arrivals go on, all of them if none is named; return what they are called.

    A watch learns those of the inbox at its next look; a server announces them at once. Another file is learned by the
    command that was held. Without `checked`, arrivals stay held whose labels disagree with the champion.

    Raises:
        ConfigError: A named arrival is not held.
    """
    state = read_state(store, lineage)
    disagreeing = {name: held for held in held_by_check(store, lineage) for name in held.names}
    waiting = {arrival.key: arrival for arrival in look(store).arrivals if state.noted_as(arrival, "held")}
    elsewhere = {name for name in disagreeing if not name.startswith(f"{INBOX}/")}
    held = [*waiting, *sorted(elsewhere)]
    if not checked:
        held = [name for name in held if name not in disagreeing]
    wanted = [name_of(store, name) for name in named] or held
    for name in wanted:
        if name not in held:
            which = f"held are: {', '.join(held)}" if held else "none is held"
            raise ConfigError(f"{name} is not held for lineage '{lineage}'; {which}.")
    # the files of one arrival go on together
    for arrival in {name: disagreeing[name] for name in wanted if name in disagreeing}.values():
        wanted += [name for name in arrival.names if name not in wanted]
        let_go(store, lineage, arrival)
    released = [waiting[name] for name in wanted if name in waiting]
    for info in released:
        run = state.files[info.key].cancelled_run
        state.record(info, "requeued", "Asked for again.", now=datetime.now(UTC), cancelled_run=run)
    if released:
        write_state(store, lineage, state)
        for info in released:
            drop_announcement(store, lineage, info)
        keys = listed([info.key for info in released])
        reporter().said(f"{keys}: held no longer; the next look of a watch learns this.")
    return tuple(wanted)
