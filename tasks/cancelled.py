"""Arrivals of cancelled runs: they are held until a person asks for them with `deal requeue`.

A person cancels a run of the deployment `adapt` on Prefect's page, by its command or by its API. All arrivals that the
run had still to learn are then held. The server's states are read before anything else is learned or announced, so the
hold does not depend on the run's process, which may have been killed before it could write anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import count, takewhile
from typing import NamedTuple

from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import get_current_settings

from deal_core.errors import ConfigError
from deal_core.safe_text import listed
from infra.store.base import ObjectInfo, ObjectStore
from tasks.announcements import Announcement, drop_announcement
from tasks.inbox import InboxLook, InboxState, look, read_state, write_state
from tasks.lineage.held import HeldArrival, held_arrivals
from tasks.progress import patient, reporter

DEPLOYMENT = "adapt"
"""The deployment of prefect.yaml whose runs learn what lands."""
CANCELLATION = (StateType.CANCELLING, StateType.CANCELLED)
"""The states of a run that a person cancels, in this order."""
_PAGE = 100
"""Runs asked for at once; a server of Prefect gives 200 at most."""


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
    """Hold the open arrivals of a lineage whose run was cancelled; return their keys.

    A cancelled run holds an arrival if it was cancelled after the arrival was announced, or after a run without an
    announcement began to learn it. An arrival that no run has seen is not held. A later `deal requeue` ends the hold.

    Args:
        store: The object store.
        lineage: The lineage.
        inbox: A look at the inbox.
        arrivals: Its open arrivals.
        announced: Key of an arrival → its last announcement, for those that have one.
    """
    if not arrivals or not get_current_settings().api.url:
        return ()
    state = read_state(store, lineage)
    times = {info.key: _waits_since(state, info, announced.get(info.key)) for info in arrivals}
    since = {key: at for key, at in times.items() if at is not None}
    runs = await cancelled_runs(lineage, min(since.values())) if since else []
    held = []
    for info in [info for info in arrivals if info.key in since]:
        released = state.requeued(info)
        over = released.cancelled_run if released else None  # by the server's clock, it may look newer than the release
        run = next((run for run in runs if run.at >= since[info.key] and run.id != over), None)
        if run is not None:
            message = f"Its run {run.name} was cancelled on {run.at.astimezone(UTC):%Y-%m-%d %H:%M} UTC."
            state.record(
                info, "held", message, now=datetime.now(UTC), beside=inbox.stamp(info), cancelled_run=run.id
            )
            held.append(info)
    if held:
        write_state(store, lineage, state)
    for info in held:
        drop_announcement(store, lineage, info, inbox.stamp(info))
        known = HeldArrival(key=info.key, why=state.files[info.key].message)
        reporter().said(f"{known.key} is held: {known.why} Let it go on with: {known.remedy(lineage)}")
    return tuple(info.key for info in held)


def _waits_since(state: InboxState, info: ObjectInfo, announced: Announcement | None) -> datetime | None:
    """Return the time from which on a cancelled run is a run of this arrival; None: no run has seen it.

    The file's own time says nothing: a copy may keep the time of its original.
    """
    released = state.requeued(info)
    if released is not None:
        return released.at
    return announced.at if announced else None


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
                sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=_PAGE, offset=offset,
            )  # fmt: skip
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
                info, "requeued", "Asked for again.", now=datetime.now(UTC), beside=inbox.stamp(info),
                cancelled_run=state.files[info.key].cancelled_run,
            )  # fmt: skip
            drop_announcement(store, lineage, info, inbox.stamp(info))
    if keys:
        write_state(store, lineage, state)
        reporter().said(f"{listed(keys)}: held no longer; the next look of a watch learns this.")
    return keys
