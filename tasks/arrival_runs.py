"""The runs that a Prefect server starts for arrivals: an event announces each arrival, and a cancelled run holds it.

A person cancels a run of the deployment `adapt` on Prefect's page, by its command or by its API. All arrivals that the
run had still to learn are then held until `deal version requeue`. The server's states are read before anything else is learned
or announced, so the hold does not depend on the run's process, which may have been killed.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count, takewhile
from typing import NamedTuple

from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events import emit_event
from prefect.settings import get_current_settings
from pydantic import BaseModel, ValidationError

from deal_core.errors import ConfigError
from deal_core.safe_text import listed
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore
from infra.store.keys import landed_key, task_of
from tasks.inbox import HeldArrival, InboxLook, growing_pause, held_arrivals, look, read_state, write_state
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

    An arrival that a run began before its announcement counts as announced; see `note_begun`.
    """

    key: str
    etag: str
    number: int
    """Number of earlier announcements."""
    at: datetime


def announce(
    store: ObjectStore,
    lineage: str,
    info: ObjectInfo,
    beside: str,
    released: datetime | None = None,
    *,
    number: int = 0,
) -> None:
    """Announce an arrival to the server, then note the announcement. A repeat after a crash counts once.

    `released` is when a person ended a hold of the arrival. The server ignores an event that it has had half an hour
    before; an announcement after the hold is another event than one before. `number` counts earlier announcements.
    """
    uri, content = store.uri_of(info.key), f"{info.etag} {beside}".strip()
    after = f" after {released.isoformat()}" if released else ""
    emit_event(
        event=ARRIVAL_LANDED,
        resource={"prefect.resource.id": f"deal.lineage.{lineage}", "prefect.resource.name": lineage},
        payload={"lineage": lineage, "task": task_of(info.key), "uri": uri, "etag": info.etag},
        id=uuid.uuid5(uuid.NAMESPACE_URL, f"{lineage} {uri}@{content} {number}{after}"),  # a repeat has the same id
        occurred=datetime.now(UTC),
    )
    _note(store, lineage, info, beside, number)


def announce_again(
    store: ObjectStore, lineage: str, info: ObjectInfo, beside: str, now: datetime, released: datetime | None = None
) -> bool:
    """Announce an open arrival without a run once more, if the pause since the last announcement is over.

    The pauses grow, because the arrival's run may be waiting for a worker. Return whether the pause was over.
    """
    known = read_announcement(store, lineage, info, beside)
    if known is None or timedelta(0) <= now - known.at < growing_pause(known.number):  # a clock may have gone back
        return False
    announce(store, lineage, info, beside, released, number=known.number + 1)
    return True


def note_begun(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> None:
    """Note an arrival that a run begins and that was not announced. If the run is lost, a server announces it again."""
    _note(store, lineage, info, beside, 0)


def read_announcements(
    store: ObjectStore, lineage: str, inbox: InboxLook, arrivals: Sequence[ObjectInfo]
) -> dict[str, Announcement]:
    """Return the last announcement of each arrival that has one, by the arrival's key."""
    found = ((info.key, read_announcement(store, lineage, info, inbox.stamp(info))) for info in arrivals)
    return {key: announced for key, announced in found if announced is not None}


def read_announcement(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> Announcement | None:
    """Return the last announcement of an arrival; None: there was none, or its note is damaged."""
    try:
        return Announcement.model_validate_json(store.get_bytes(_announcement_key(lineage, info, beside)))
    except (ObjectNotFoundError, ValidationError):
        return None


def drop_announcement(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> None:
    """Delete the note of an announcement after its arrival was handled."""
    store.delete(_announcement_key(lineage, info, beside))


def _note(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str, number: int) -> None:
    noted = Announcement(key=info.key, etag=info.etag, number=number, at=datetime.now(UTC))
    store.put_bytes(_announcement_key(lineage, info, beside), noted.model_dump_json().encode())


def _announcement_key(lineage: str, info: ObjectInfo, beside: str) -> str:
    digest = hashlib.sha256(f"{info.key}\n{info.etag}\n{beside}".encode()).hexdigest()
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
    store: ObjectStore,
    lineage: str,
    inbox: InboxLook,
    arrivals: Sequence[ObjectInfo],
    announced: Mapping[str, Announcement],
) -> tuple[str, ...]:
    """Hold those of a lineage's open arrivals whose run was cancelled; return their keys.

    A cancelled run holds an arrival if it was cancelled after the arrival was announced, or after a run without an
    announcement began to learn it. An arrival that no run has seen is not held: the file's own time says nothing, since
    a copy may keep the time of its original. A later `deal version requeue` ends the hold. `announced` has the last
    announcement by the arrival's key.
    """
    if not arrivals or not get_current_settings().api.url:
        return ()
    state = read_state(store, lineage)
    seen = {info.key: state.requeued(info) or announced.get(info.key) for info in arrivals}
    since = {key: known.at for key, known in seen.items() if known is not None}
    runs = await cancelled_runs(lineage, min(since.values())) if since else []
    held = []
    before, state = state, read_state(store, lineage)  # another process may have recorded a result meanwhile
    for info in [info for info in arrivals if info.key in since]:
        released = before.requeued(info)
        over = released.cancelled_run if released else None  # by the server's clock, it may look newer than the release
        run = next((run for run in runs if run.at >= since[info.key] and run.id != over), None)
        if run is not None and state.files.get(info.key) == before.files.get(info.key):
            message = f"Its run {run.name} was cancelled on {run.at.astimezone(UTC):%Y-%m-%d %H:%M} UTC."
            state.record(info, "held", message, now=datetime.now(UTC), beside=inbox.stamp(info), cancelled_run=run.id)
            held.append(info)
    if held:
        write_state(store, lineage, state)
    for info in held:
        drop_announcement(store, lineage, info, inbox.stamp(info))
        known = HeldArrival(key=info.key, why=state.files[info.key].message)
        reporter().said(f"{known.key} is held: {known.why} Let it go on with: {known.remedy(lineage)}")
    return tuple(info.key for info in held)


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
        found = []
        for run in runs:
            if run.parameters.get("lineage") == lineage and run.state is not None and run.state.timestamp >= since:
                at = _asked_at(await client.read_flow_run_states(run.id))
                found += [CancelledRun(str(run.id), run.name, at)] if at else []
    return sorted((run for run in found if run.at >= since), key=lambda run: run.at, reverse=True)


def _asked_at(states: Sequence[State]) -> datetime | None:
    """Return when a cancelled run was asked to end: the time of the first state of its last cancellation.

    None: somebody has started the run again since.
    """
    newest_first = sorted(states, key=lambda state: state.timestamp, reverse=True)
    last = list(takewhile(lambda state: state.type in CANCELLATION, newest_first))
    return last[-1].timestamp if last else None


def release(store: ObjectStore, lineage: str, named: Sequence[str] = ()) -> tuple[str, ...]:
    """Let held arrivals go on, all of them if none is named; return their keys.

    A watch learns them at its next look; a server announces them at once.

    Raises:
        ConfigError: A named arrival is not held.
    """
    inbox, state = look(store), read_state(store, lineage)
    held = [each.key for each in held_arrivals(inbox, state)]
    for key in named:
        if key not in held:
            known = f"held are: {', '.join(held)}" if held else "none is held"
            raise ConfigError(f"{key} is not held for lineage '{lineage}'; {known}.")
    keys = tuple(key for key in held if not named or key in named)
    for info in inbox.arrivals:
        if info.key in keys:
            state.record(
                info,
                "requeued",
                "Asked for again.",
                now=datetime.now(UTC),
                beside=inbox.stamp(info),
                cancelled_run=state.files[info.key].cancelled_run,
            )
    if keys:
        write_state(store, lineage, state)
        for info in inbox.arrivals:
            if info.key in keys:
                drop_announcement(store, lineage, info, inbox.stamp(info))
        reporter().said(f"{listed(keys)}: held no longer; the next look of a watch learns this.")
    return keys
