"""Watch the inbox for a server: say what has landed; the run that adapts to it is another one."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from prefect import flow, runtime

from flows.arrivals import look
from flows.lineages import WatchedLineage, list_lineages
from flows.lock import is_held_on_server
from infra.landing import LandingQueue, open_landing_queue
from infra.object_store import ObjectStore
from tasks.announcements import announce, announce_again, read_announcement
from tasks.inbox import read_state, split_settled, stamp_of, task_of
from tasks.progress import is_stopped, reporter
from tasks.services import current_store

Stamps = dict[str, str]


@flow(name="watch-inbox", flow_run_name="watch-inbox")
async def watch_inbox(for_seconds: float = 630.0, poll_seconds: float = 2.0) -> int:
    """Announce what lands for every lineage, for a while; return how many announcements were made.

    With DEAL_LANDING_QUEUE_URL set, a notification of the bucket starts a look at once; looks without one still come,
    every 20 seconds, since notifications may get lost.

    Args:
        for_seconds: how long from when it was scheduled; the next one begins a little before, so that somebody always
            looks. What two of them announce counts once.
        poll_seconds: pause between two looks.
    """
    store, queue = current_store(), open_landing_queue()
    end = (runtime.flow_run.scheduled_start_time or datetime.now(UTC)) + timedelta(seconds=for_seconds)
    stamps: dict[str, Stamps] = {}
    num_announced = 0
    while True:
        for lineage in list_lineages(store):
            seen = stamps.setdefault(lineage.lineage, {})
            num_announced += await announce_open(store, lineage, seen, poll_seconds)
        if queue is not None:
            queue.done()
        left = (end - datetime.now(UTC)).total_seconds()
        if left <= 0 or is_stopped():
            return num_announced
        await _pause(queue, min(left, poll_seconds), min(left, 20.0))


async def announce_open(store: ObjectStore, lineage: WatchedLineage, seen: Stamps, settle_seconds: float) -> int:
    """Announce a lineage's open arrivals that are complete; return how many.

    Args:
        store: holds the inbox.
        lineage: who has to learn them.
        seen: what the look before saw; replaced by what this one sees.
        settle_seconds: how long a file must have been left alone, unless the look before saw the same.
    """
    name = lineage.lineage
    inbox = look(store, lineage.tasks)
    arrivals = inbox.open_for(read_state(store, name), retry_now=False)
    settled, _ = split_settled(arrivals, seen, datetime.now(UTC), settle_seconds, inbox.beside)
    seen.clear()
    seen.update({info.key: stamp_of(info, inbox.beside.get(task_of(info.key))) for info in arrivals})
    num_announced = 0
    lost = []
    for info in settled:
        if read_announcement(store, name, info, inbox.stamp(info)):
            lost.append(info)
            continue
        announce(store, name, info, inbox.stamp(info))
        reporter().said(f"{info.key} has landed for lineage '{name}'")
        num_announced += 1
    if lost and not await is_held_on_server(name):
        # one is enough: the run that takes it takes whatever is open
        again = announce_again(store, name, lost[0], inbox.stamp(lost[0]), datetime.now(UTC))
        num_announced += again
    return num_announced


async def _pause(queue: LandingQueue | None, poll_seconds: float, wait_seconds: float) -> None:
    if queue is None:
        await asyncio.sleep(poll_seconds)
    else:
        await asyncio.to_thread(queue.wait, wait_seconds)
